// Batch norm over all pixels of all samples, channel by channel.
//
//   xh = (x - mean) r,  r = 1 / sqrt(var + eps),  y = gamma xh + beta
//   backward: h = gamma dy;  dx = r (h - E[h] - xh E[h xh]);  dgamma = sum dy xh;  dbeta = sum dy
//   tangents: q = E[xh x'];  xh' = r (x' - E[x'] - xh q);  r' = -r^2 q; the rest by the product rule.
//
// With frozen statistics mean and r are constants: the terms with E[] vanish and xh' = r x'.
#pragma once

#include "op.h"

namespace metaaug::METAAUG_ISA {
namespace batch_norm {

// saved: mean, r, variance.  saved_tangent: E[x'], q.
template <class T>
void plan(OpPlan<T>& plan) {
  plan.saved = 3 * plan.out.stride;
  plan.saved_tangent = 2 * plan.out.stride;
}

template <class T>
bool frozen(const OpCall<T>& call) {
  return call.plan.op.buffer[0] >= 0;
}

template <class T>
void statistics(const OpCall<T>& call) {
  using S = Simd<T>;
  using Vector = typename S::Vector;
  const int64_t rows = call.plan.rows(), stride = call.plan.out.stride;
  const int channels = call.plan.out.shape.channels;
  const T eps = T(call.plan.op.eps);
  each_block<T>(stride, [&](int64_t channel, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const T* x = call.x[0] + channel;
    Vector mean[1][kVectors], square[1][kVectors];
    sum_rows<T>(rows, mean, [&](int64_t row, auto& part) {
      for (int j = 0; j < kVectors; ++j) part[0][j] += S::load(x + row * stride + j * S::kWidth);
    });
    for (int j = 0; j < kVectors; ++j) mean[0][j] /= S::fill(T(rows));
    sum_rows<T>(rows, square, [&](int64_t row, auto& part) {
      for (int j = 0; j < kVectors; ++j) {
        const Vector centred = S::load(x + row * stride + j * S::kWidth) - mean[0][j];
        part[0][j] += centred * centred;
      }
    });
    for (int j = 0; j < kVectors; ++j)
      for (int i = 0; i < S::kWidth; ++i) {
        const int64_t c = channel + j * S::kWidth + i;
        const T variance = square[0][j][i] / T(rows);
        call.saved[c] = mean[0][j][i];
        // Padding has no variance: without an eps, 1 / 0 would come back as NaN.
        call.saved[stride + c] = c < channels ? T(1) / std::sqrt(variance + eps) : T(0);
        call.saved[2 * stride + c] = variance;
      }
  });
}

// Per-channel vectors of one block, a neutral value standing for an absent parameter.
template <class T, int kVectors>
struct Block {
  using S = Simd<T>;
  typename S::Vector v[kVectors];
  Block(const T* source, int64_t channel, T absent) {
    for (int j = 0; j < kVectors; ++j) v[j] = source ? S::load(source + channel + j * S::kWidth) : S::fill(absent);
  }
  typename S::Vector operator[](int j) const { return v[j]; }
};

// A frozen call finds mean and r in `saved`, where the executor has put the constants.
template <class T>
void forward(const OpCall<T>& call) {
  using S = Simd<T>;
  const int64_t rows = call.plan.rows(), stride = call.plan.out.stride;
  if (!frozen(call)) statistics(call);
  each_block<T>(stride, [&](int64_t channel, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const Block<T, kVectors> mean(call.saved, channel, T(0)), r(call.saved + stride, channel, T(0)),
        gamma(call.p[0], channel, T(1)), beta(call.p[1], channel, T(0));
    for (int64_t row = 0; row < rows; ++row)
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = row * stride + channel + j * S::kWidth;
        S::store(call.y + at, (S::load(call.x[0] + at) - mean[j]) * (r[j] * gamma[j]) + beta[j]);
      }
  });
}

template <class T>
void backward(const OpCall<T>& call) {
  using S = Simd<T>;
  using Vector = typename S::Vector;
  const int64_t rows = call.plan.rows(), stride = call.plan.out.stride;
  const T share = frozen(call) ? T(0) : T(1) / T(rows);
  each_block<T>(stride, [&](int64_t channel, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const Block<T, kVectors> mean(call.saved, channel, T(0)), r(call.saved + stride, channel, T(0)),
        gamma(call.p[0], channel, T(1));
    Vector sums[2][kVectors];  // dy, dy xh
    sum_rows<T>(rows, sums, [&](int64_t row, auto& part) {
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = row * stride + channel + j * S::kWidth;
        const Vector dy = S::load(call.dy + at);
        part[0][j] += dy;
        part[1][j] += dy * ((S::load(call.x[0] + at) - mean[j]) * r[j]);
      }
    });
    for (int p = 0; p < 2; ++p)
      for (int j = 0; call.dp[p] && j < kVectors; ++j) {
        T* target = call.dp[p] + channel + j * S::kWidth;
        S::store(target, S::load(target) + sums[1 - p][j]);
      }
    if (!call.dx[0]) return;
    for (int64_t row = 0; row < rows; ++row)
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = row * stride + channel + j * S::kWidth;
        const Vector xh = (S::load(call.x[0] + at) - mean[j]) * r[j];
        const Vector dx = gamma[j] * r[j] * (S::load(call.dy + at) - share * (sums[0][j] + xh * sums[1][j]));
        S::store(call.dx[0] + at, call.accumulate[0] ? S::load(call.dx[0] + at) + dx : dx);
      }
  });
}

template <class T>
void tangent(const OpCall<T>& call) {
  using S = Simd<T>;
  using Vector = typename S::Vector;
  const int64_t rows = call.plan.rows(), stride = call.plan.out.stride;
  const T share = frozen(call) ? T(0) : T(1) / T(rows);
  each_block<T>(stride, [&](int64_t channel, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const Block<T, kVectors> mean(call.saved, channel, T(0)), r(call.saved + stride, channel, T(0)),
        gamma(call.p[0], channel, T(1)), gamma_t(call.p_t[0], channel, T(0)), beta_t(call.p_t[1], channel, T(0));
    const auto xh_at = [&](int64_t at, int j) { return (S::load(call.x[0] + at) - mean[j]) * r[j]; };
    Vector sums[2][kVectors] = {};  // x', xh x'
    if (call.x_t[0]) {
      sum_rows<T>(rows, sums, [&](int64_t row, auto& part) {
        for (int j = 0; j < kVectors; ++j) {
          const int64_t at = row * stride + channel + j * S::kWidth;
          const Vector x_t = S::load(call.x_t[0] + at);
          part[0][j] += x_t;
          part[1][j] += x_t * xh_at(at, j);
        }
      });
    }
    for (int j = 0; j < kVectors; ++j) {
      S::store(call.saved_tangent + channel + j * S::kWidth, sums[0][j] *= share);
      S::store(call.saved_tangent + stride + channel + j * S::kWidth, sums[1][j] *= share);
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = row * stride + channel + j * S::kWidth;
        const Vector xh = xh_at(at, j);
        Vector y_t = gamma_t[j] * xh + beta_t[j];
        if (call.x_t[0]) y_t += gamma[j] * r[j] * (S::load(call.x_t[0] + at) - sums[0][j] - xh * sums[1][j]);
        S::store(call.y_t + at, y_t);
      }
  });
}

template <class T>
void tangent_backward(const OpCall<T>& call) {
  using S = Simd<T>;
  using Vector = typename S::Vector;
  const int64_t rows = call.plan.rows(), stride = call.plan.out.stride;
  const T share = frozen(call) ? T(0) : T(1) / T(rows);
  each_block<T>(stride, [&](int64_t channel, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const Block<T, kVectors> mean(call.saved, channel, T(0)), r(call.saved + stride, channel, T(0)),
        gamma(call.p[0], channel, T(1)), gamma_t(call.p_t[0], channel, T(0)), mean_t(call.saved_tangent, channel, T(0)),
        q(call.saved_tangent + stride, channel, T(0));
    const auto xh_at = [&](int64_t at, int j) { return (S::load(call.x[0] + at) - mean[j]) * r[j]; };
    const auto xh_t_at = [&](int64_t at, Vector xh, int j) {
      return call.x_t[0] ? r[j] * (S::load(call.x_t[0] + at) - mean_t[j] - xh * q[j]) : Vector{};
    };
    Vector sums[4][kVectors];  // dy, dy xh, dy', dy' xh + dy xh'
    sum_rows<T>(rows, sums, [&](int64_t row, auto& part) {
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = row * stride + channel + j * S::kWidth;
        const Vector dy = S::load(call.dy + at), dy_t = S::load(call.dy_t + at), xh = xh_at(at, j);
        part[0][j] += dy;
        part[1][j] += dy * xh;
        part[2][j] += dy_t;
        part[3][j] += dy_t * xh + dy * xh_t_at(at, xh, j);
      }
    });
    for (int p = 0; p < 2; ++p)
      for (int j = 0; call.dp_t[p] && j < kVectors; ++j) {
        T* target = call.dp_t[p] + channel + j * S::kWidth;
        S::store(target, S::load(target) + sums[3 - p][j]);
      }
    if (!call.dx_t[0]) return;
    Vector h[kVectors], hxh[kVectors], h_t[kVectors], hxh_t[kVectors], r_t[kVectors];  // means
    for (int j = 0; j < kVectors; ++j) {
      h[j] = share * gamma[j] * sums[0][j];
      hxh[j] = share * gamma[j] * sums[1][j];
      h_t[j] = share * (gamma_t[j] * sums[0][j] + gamma[j] * sums[2][j]);
      hxh_t[j] = share * (gamma_t[j] * sums[1][j] + gamma[j] * sums[3][j]);
      r_t[j] = -r[j] * r[j] * q[j];
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = row * stride + channel + j * S::kWidth;
        const Vector dy = S::load(call.dy + at), dy_t = S::load(call.dy_t + at), xh = xh_at(at, j);
        const Vector plain = gamma[j] * dy - h[j] - xh * hxh[j];
        const Vector moved = gamma_t[j] * dy + gamma[j] * dy_t - h_t[j] - xh_t_at(at, xh, j) * hxh[j] - xh * hxh_t[j];
        const Vector dx_t = r_t[j] * plain + r[j] * moved;
        S::store(call.dx_t[0] + at, call.accumulate[0] ? S::load(call.dx_t[0] + at) + dx_t : dx_t);
      }
  });
}

}  // namespace batch_norm
}  // namespace metaaug::METAAUG_ISA
