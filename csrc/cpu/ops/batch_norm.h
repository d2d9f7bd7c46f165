// Batch norm over all pixels of all samples, channel by channel, with the relu and the 2x2 max pool that may follow.
//
//   xh = (x - mean) r,  r = 1 / sqrt(var + eps),  z = gamma xh + beta
//   backward: h = gamma dz;  dx = r (h - E[h] - xh E[h xh]);  dgamma = sum dz xh;  dbeta = sum dz
//   tangents: q = E[xh x'];  xh' = r (x' - E[x'] - xh q);  r' = -r^2 q; the rest by the product rule.
//
// With frozen statistics mean and r are constants: the terms with E[] vanish and xh' = r x'.
//
// Behind it, y = relu(max of z over a window). Nothing but y is stored: which pixel of a window is chosen, the first of
// equal ones, is found from x again, and every other pixel has dz = 0.
#pragma once

#include "op.h"

namespace metaaug::METAAUG_ISA {

template <class T, bool kRelu, bool kPool>
struct BatchNorm {
  using S = Simd<T>;
  using Vector = typename S::Vector;
  static constexpr int kWindow = kPool ? 4 : 1;

  // saved: mean, r, variance.  saved_tangent: E[x'], q.
  static void plan(OpPlan<T>& plan) {
    plan.saved = 3 * plan.out.stride;
    plan.saved_tangent = 2 * plan.out.stride;
  }

  // A frozen call finds mean and r in `saved`, where the executor has put the constants.
  static void forward(const OpCall<T>& call) {
    if (!frozen(call)) statistics(call);
    each_block<T>(call.plan.out.stride, [&](int64_t channel, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      const Normal<kVectors> normal(call, channel);
      each_window(call.plan, [&](int64_t to, const int64_t (&from)[kWindow]) {
        for (int j = 0; j < kVectors; ++j) {
          const Choice best = normal.choose(from, j);
          const Vector y = !kRelu ? best.z : best.z < Vector{} ? Vector{} : best.z;
          S::store(call.y + to * normal.stride + channel + j * S::kWidth, y);
        }
      });
    });
  }

  static void backward(const OpCall<T>& call) {
    const T share = mean_share(call);
    each_block<T>(call.plan.out.stride, [&](int64_t channel, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      const Normal<kVectors> normal(call, channel);
      Sums<2, kVectors> sums;  // dz, dz xh
      sum_windows(call.plan, sums, [&](int64_t to, const int64_t (&from)[kWindow], auto& part) {
        for (int j = 0; j < kVectors; ++j) {
          const Choice best = normal.choose(from, j);
          const Vector dz = best.through(S::load(call.dy + to * normal.stride + channel + j * S::kWidth));
          part[0][j] += dz;
          part[1][j] += dz * best.xh;
        }
      });
      for (int p = 0; p < 2; ++p)
        for (int j = 0; call.dp[p] && j < kVectors; ++j) add(call.dp[p] + channel + j * S::kWidth, sums[1 - p][j]);
      if (!call.dx[0]) return;
      const auto dx_at = [&](int64_t row, int j, Vector dz) {
        const Vector xh = normal.xh(row, j);
        const Vector dx = normal.gamma[j] * normal.r[j] * (dz - share * (sums[0][j] + xh * sums[1][j]));
        put_vector(call.dx[0] + row * normal.stride + channel + j * S::kWidth, dx, call.accumulate[0]);
      };
      each_window(call.plan, [&](int64_t to, const int64_t (&from)[kWindow]) {
        for (int j = 0; j < kVectors; ++j) {
          const Choice best = normal.choose(from, j);
          const Vector dz = best.through(S::load(call.dy + to * normal.stride + channel + j * S::kWidth));
          for (int tap = 0; tap < kWindow; ++tap) dx_at(from[tap], j, best.at(tap, dz));
        }
      });
      each_pixel_outside(call.plan, [&](int64_t row) {
        for (int j = 0; j < kVectors; ++j) dx_at(row, j, Vector{});
      });
    });
  }

  static void tangent(const OpCall<T>& call) {
    const int64_t rows = call.plan.in_rows(), stride = call.plan.out.stride;
    const T share = mean_share(call);
    each_block<T>(stride, [&](int64_t channel, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      const Normal<kVectors> normal(call, channel);
      const Block<kVectors> gamma_t(call.p_t[0], channel, T(0)), beta_t(call.p_t[1], channel, T(0));
      Sums<2, kVectors> sums = {};  // x', xh x'
      if (call.x_t[0]) {
        sum_rows<T>(rows, sums, [&](int64_t row, auto& part) {
          for (int j = 0; j < kVectors; ++j) {
            const Vector x_t = S::load(call.x_t[0] + row * stride + channel + j * S::kWidth);
            part[0][j] += x_t;
            part[1][j] += x_t * normal.xh(row, j);
          }
        });
      }
      for (int j = 0; j < kVectors; ++j) {
        S::store(call.saved_tangent + channel + j * S::kWidth, sums[0][j] *= share);
        S::store(call.saved_tangent + stride + channel + j * S::kWidth, sums[1][j] *= share);
      }
      each_window(call.plan, [&](int64_t to, const int64_t (&from)[kWindow]) {
        for (int j = 0; j < kVectors; ++j) {
          const Choice best = normal.choose(from, j);
          Vector z_t = gamma_t[j] * best.xh + beta_t[j];
          if (call.x_t[0]) {
            const Vector x_t = best.load(call.x_t[0] + channel + j * S::kWidth, from, stride);
            z_t += normal.gamma[j] * normal.r[j] * (x_t - sums[0][j] - best.xh * sums[1][j]);
          }
          S::store(call.y_t + to * stride + channel + j * S::kWidth, best.through(z_t));
        }
      });
    });
  }

  static void tangent_backward(const OpCall<T>& call) {
    const int64_t stride = call.plan.out.stride;
    const T share = mean_share(call);
    each_block<T>(stride, [&](int64_t channel, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      const Normal<kVectors> normal(call, channel);
      const Block<kVectors> gamma_t(call.p_t[0], channel, T(0)), mean_t(call.saved_tangent, channel, T(0)),
          q(call.saved_tangent + stride, channel, T(0));
      const auto xh_t = [&](Vector x_t, Vector xh, int j) { return normal.r[j] * (x_t - mean_t[j] - xh * q[j]); };
      Sums<4, kVectors> sums;  // dz, dz xh, dz', dz' xh + dz xh'
      sum_windows(call.plan, sums, [&](int64_t to, const int64_t (&from)[kWindow], auto& part) {
        for (int j = 0; j < kVectors; ++j) {
          const int64_t column = channel + j * S::kWidth;
          const Choice best = normal.choose(from, j);
          const Vector dz = best.through(S::load(call.dy + to * stride + column));
          const Vector dz_t = best.through(S::load(call.dy_t + to * stride + column));
          part[0][j] += dz;
          part[1][j] += dz * best.xh;
          part[2][j] += dz_t;
          part[3][j] += dz_t * best.xh;
          if (call.x_t[0]) part[3][j] += dz * xh_t(best.load(call.x_t[0] + column, from, stride), best.xh, j);
        }
      });
      for (int p = 0; p < 2; ++p)
        for (int j = 0; call.dp_t[p] && j < kVectors; ++j) add(call.dp_t[p] + channel + j * S::kWidth, sums[3 - p][j]);
      if (!call.dx_t[0]) return;
      Vector h[kVectors], hxh[kVectors], h_t[kVectors], hxh_t[kVectors], r_t[kVectors];  // means
      for (int j = 0; j < kVectors; ++j) {
        h[j] = share * normal.gamma[j] * sums[0][j];
        hxh[j] = share * normal.gamma[j] * sums[1][j];
        h_t[j] = share * (gamma_t[j] * sums[0][j] + normal.gamma[j] * sums[2][j]);
        hxh_t[j] = share * (gamma_t[j] * sums[1][j] + normal.gamma[j] * sums[3][j]);
        r_t[j] = -normal.r[j] * normal.r[j] * q[j];
      }
      const auto dx_t_at = [&](int64_t row, int j, Vector dz, Vector dz_t) {
        const int64_t at = row * stride + channel + j * S::kWidth;
        const Vector xh = normal.xh(row, j);
        const Vector plain = normal.gamma[j] * dz - h[j] - xh * hxh[j];
        Vector moved = gamma_t[j] * dz + normal.gamma[j] * dz_t - h_t[j] - xh * hxh_t[j];
        if (call.x_t[0]) moved -= xh_t(S::load(call.x_t[0] + at), xh, j) * hxh[j];
        put_vector(call.dx_t[0] + at, r_t[j] * plain + normal.r[j] * moved, call.accumulate[0]);
      };
      each_window(call.plan, [&](int64_t to, const int64_t (&from)[kWindow]) {
        for (int j = 0; j < kVectors; ++j) {
          const int64_t column = channel + j * S::kWidth;
          const Choice best = normal.choose(from, j);
          const Vector dz = best.through(S::load(call.dy + to * stride + column));
          const Vector dz_t = best.through(S::load(call.dy_t + to * stride + column));
          for (int tap = 0; tap < kWindow; ++tap) dx_t_at(from[tap], j, best.at(tap, dz), best.at(tap, dz_t));
        }
      });
      each_pixel_outside(call.plan, [&](int64_t row) {
        for (int j = 0; j < kVectors; ++j) dx_t_at(row, j, Vector{}, Vector{});
      });
    });
  }

 private:
  template <int kSums, int kVectors>
  using Sums = Vector[kSums][kVectors];

  static bool frozen(const OpCall<T>& call) { return call.plan.op.buffer[0] >= 0; }
  static T mean_share(const OpCall<T>& call) { return frozen(call) ? T(0) : T(1) / T(call.plan.in_rows()); }
  static void add(T* target, Vector value) { S::store(target, S::load(target) + value); }
  static void put_vector(T* target, Vector value, bool accumulate) {
    S::store(target, accumulate ? S::load(target) + value : value);
  }

  // The pixel of a window whose z is largest.
  struct Choice {
    Vector z, xh, tap;

    // What of an adjoint or a tangent passes the relu.
    Vector through(Vector v) const { return !kRelu ? v : z > Vector{} ? v : Vector{}; }
    // Of an adjoint of y, what goes to one tap.
    Vector at(int which, Vector v) const { return kWindow == 1 ? v : tap == S::fill(T(which)) ? v : Vector{}; }
    // The chosen pixel of another array.
    Vector load(const T* column, const int64_t (&from)[kWindow], int64_t stride) const {
      Vector v = S::load(column + from[0] * stride);
      for (int i = 1; i < kWindow; ++i) v = tap == S::fill(T(i)) ? S::load(column + from[i] * stride) : v;
      return v;
    }
  };

  // Per-channel vectors of one block, a neutral value standing for an absent parameter.
  template <int kVectors>
  struct Block {
    Vector v[kVectors];
    Block(const T* source, int64_t channel, T absent) {
      for (int j = 0; j < kVectors; ++j) v[j] = source ? S::load(source + channel + j * S::kWidth) : S::fill(absent);
    }
    Vector operator[](int j) const { return v[j]; }
  };

  template <int kVectors>
  struct Normal {
    const int64_t stride;
    const T* x;
    const Block<kVectors> mean, r, gamma, beta;

    Normal(const OpCall<T>& call, int64_t channel)
        : stride(call.plan.out.stride),
          x(call.x[0] + channel),
          mean(call.saved, channel, T(0)),
          r(call.saved + stride, channel, T(0)),
          gamma(call.p[0], channel, T(1)),
          beta(call.p[1], channel, T(0)) {}

    Vector xh(int64_t row, int j) const { return (S::load(x + row * stride + j * S::kWidth) - mean[j]) * r[j]; }

    Choice choose(const int64_t (&from)[kWindow], int j) const {
      Choice best{{}, xh(from[0], j), {}};
      best.z = gamma[j] * best.xh + beta[j];
      for (int i = 1; i < kWindow; ++i) {
        const Vector other = xh(from[i], j), z = gamma[j] * other + beta[j];
        const auto better = (z > best.z) | (z != z);
        best.z = better ? z : best.z;
        best.xh = better ? other : best.xh;
        best.tap = better ? S::fill(T(i)) : best.tap;
      }
      return best;
    }
  };

  static void statistics(const OpCall<T>& call) {
    const int64_t rows = call.plan.in_rows(), stride = call.plan.out.stride;
    const int channels = call.plan.out.shape.channels;
    const T eps = T(call.plan.op.eps);
    each_block<T>(stride, [&](int64_t channel, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      const T* x = call.x[0] + channel;
      Sums<1, kVectors> mean, square;
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

  // body(row of y, rows of x in its window)
  template <class Body>
  static void each_window(const OpPlan<T>& plan, const Body& body) {
    for (int line = 0; line < lines(plan); ++line) each_window_of(plan, line, body);
  }

  static int lines(const OpPlan<T>& plan) { return plan.images * plan.out.shape.height; }

  template <class Body>
  static void each_window_of(const OpPlan<T>& plan, int line, const Body& body) {
    const Shape &in = plan.in[0].shape, &out = plan.out.shape;
    const int64_t to = int64_t{line} * out.width;
    if constexpr (kWindow == 1) {
      for (int x = 0; x < out.width; ++x) body(to + x, {to + x});
    } else {
      const int64_t first = (int64_t{line / out.height} * in.height + line % out.height * 2) * in.width;
      for (int x = 0; x < out.width; ++x) {
        const int64_t from = first + 2 * x;
        body(to + x, {from, from + 1, from + in.width, from + in.width + 1});
      }
    }
  }

  // The last row and column of an odd picture are in no window.
  template <class Body>
  static void each_pixel_outside(const OpPlan<T>& plan, const Body& body) {
    const Shape& in = plan.in[0].shape;
    if (kWindow == 1 || (in.height % 2 == 0 && in.width % 2 == 0)) return;
    for (int n = 0; n < plan.images; ++n)
      for (int y = 0; y < in.height; ++y) {
        const int64_t first = (int64_t{n} * in.height + y) * in.width;
        const bool whole = y == in.height - 1 && in.height % 2;
        for (int x = whole ? 0 : in.width - in.width % 2; x < in.width; ++x) body(first + x);
      }
  }

  // Like `sum_rows`, over windows: chunks are lines of y, a whole number of them.
  template <int kSums, int kVectors, class Body>
  static void sum_windows(const OpPlan<T>& plan, Sums<kSums, kVectors>& total, const Body& body) {
    const int64_t lines_at_once = std::max(1, 128 / plan.out.shape.width);
    sum_chunks<T>(lines(plan), lines_at_once, total, [&](int64_t line, auto& part) {
      each_window_of(plan, int(line), [&](int64_t to, const int64_t (&from)[kWindow]) { body(to, from, part); });
    });
  }
};

}  // namespace metaaug::METAAUG_ISA
