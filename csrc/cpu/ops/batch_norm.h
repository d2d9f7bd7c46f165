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

#include "conv2d.h"

namespace metaaug::METAAUG_ISA {

// Adds to the mean and the sum of squares around it of `before` values those of `count` others (Chan, Golub and LeVeque
// 1979).
template <class T>
void join_moments(int64_t before, int64_t count, typename Simd<T>::Vector mean, typename Simd<T>::Vector square,
                  T* mean_at, T* square_at) {
  using S = Simd<T>;
  const T weight = T(count) / T(before + count);
  const auto apart = mean - S::load(mean_at);
  S::store(mean_at, S::load(mean_at) + weight * apart);
  S::store(square_at, S::load(square_at) + square + T(before) * weight * apart * apart);
}

template <class T, bool kRelu, bool kPool>
struct BatchNorm {
  using S = Simd<T>;
  using Vector = typename S::Vector;
  static constexpr int kWindow = kPool ? 4 : 1;

  // saved: mean, r, variance.  saved_tangent: E[x'], q.
  static void plan(OpPlan<T>& plan) {
    plan.saved = 3 * plan.out.stride;
    plan.saved_tangent = 2 * plan.out.stride;
    plan.scratch = kMaxSums * plan.out.stride;
  }

  // A frozen call finds mean and r in `saved`, where the executor has put the constants.
  static void forward(const OpCall<T>& call) {
    if (!frozen(call)) {
      moments(call, call.saved, call.saved + 2 * call.plan.out.stride);
      settle(call.plan, call.plan.in_rows(), call.saved);
    }
    normalise(call);
  }

  // Mean and sum of squares around it, part by part, each while it is in the first cache: as exact as two passes over
  // everything.
  static void moments(const OpCall<T>& call, T* mean, T* square) {
    const OpPlan<T>& plan = call.plan;
    const int64_t stride = plan.out.stride;
    std::fill(mean, mean + stride, T(0));
    std::fill(square, square + stride, T(0));
    each_part(call, [&](const Lines& lines, int64_t channel, auto vectors) {
      const int64_t before = row_of(plan, lines.first), count = row_of(plan, lines.last) - before;
      const T share = T(1) / T(count);
      const T* x = call.x[0] + channel;
      Vector middle[vectors.value] = {}, apart[vectors.value] = {};
      each_pixel(plan, lines, [&](int64_t row) {
        for (int j = 0; j < vectors.value; ++j) middle[j] += S::load(x + row * stride + j * S::kWidth);
      });
      for (int j = 0; j < vectors.value; ++j) middle[j] *= share;
      each_pixel(plan, lines, [&](int64_t row) {
        for (int j = 0; j < vectors.value; ++j) {
          const Vector centred = S::load(x + row * stride + j * S::kWidth) - middle[j];
          apart[j] += centred * centred;
        }
      });
      for (int j = 0; j < vectors.value; ++j) {
        const int64_t at = channel + j * S::kWidth;
        join_moments<T>(before, count, middle[j], apart[j], mean + at, square + at);
      }
    });
  }

  // `saved` from the mean and the sum of squares that lie in it.
  static void settle(const OpPlan<T>& plan, int64_t rows, T* saved) {
    const int64_t stride = plan.out.stride;
    T *r = saved + stride, *variance = r + stride;
    for (int64_t c = 0; c < stride; ++c) {
      variance[c] /= T(rows);
      // Padding has no variance: without an eps, 1 / 0 would come back as NaN.
      r[c] = c < plan.out.shape.channels ? T(1) / std::sqrt(variance[c] + T(plan.op.eps)) : T(0);
    }
  }

  static void normalise(const OpCall<T>& call) {
    each_part(call, [&](const Lines& lines, int64_t channel, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      const Normal<kVectors> normal(call, channel);
      each_window(call.plan, lines, [&](int64_t to, const int64_t (&from)[kWindow]) {
        for (int j = 0; j < kVectors; ++j) {
          const Choice best = normal.template choose<true>(from, j);
          const Vector y = !kRelu ? best.z : best.z < Vector{} ? Vector{} : best.z;
          S::store(call.y + to * normal.stride + channel + j * S::kWidth, y);
        }
      });
    });
  }

  static void backward(const OpCall<T>& call) {
    const int64_t stride = call.plan.out.stride;
    const T* sums = adjoint_sums(call);
    for (int p = 0; p < 2; ++p)
      if (call.dp[p]) add(call.dp[p], sums + (1 - p) * stride, stride);
    if (call.dx[0]) spread(call, sums, mean_share(call));
  }

  // Of dz and dz xh.
  static const T* adjoint_sums(const OpCall<T>& call) {
    const int64_t stride = call.plan.out.stride;
    return sum_parts<2>(call, [&](const Lines& lines, int64_t channel, auto vectors, auto& part) {
      constexpr int kVectors = decltype(vectors)::value;
      const Normal<kVectors> normal(call, channel);
      each_window(call.plan, lines, [&](int64_t to, const int64_t (&from)[kWindow]) {
        for (int j = 0; j < kVectors; ++j) {
          const Choice best = normal.choose(from, j);
          const Vector dz = best.through(S::load(call.dy + to * stride + channel + j * S::kWidth));
          part[0][j] += dz;
          part[1][j] += dz * best.xh;
        }
      });
    });
  }

  // dx from the sums over all that the norm sees, of which a pixel is `share`.
  static void spread(const OpCall<T>& call, const T* sums, T share) {
    const int64_t stride = call.plan.out.stride;
    each_part_of_adjoint(call, call.dx[0], [&](const Lines& lines, int64_t channel, auto vectors, T* dx) {
      constexpr int kVectors = decltype(vectors)::value;
      const Normal<kVectors> normal(call, channel);
      const Block<kVectors> dz_sum(sums, channel, T(0)), dz_xh_sum(sums + stride, channel, T(0));
      Vector same[kVectors], along_x[kVectors];  // dx = scale dz - same - along_x (x - mean)
      for (int j = 0; j < kVectors; ++j) {
        same[j] = share * normal.scale[j] * dz_sum[j];
        along_x[j] = share * normal.scale[j] * normal.r[j] * dz_xh_sum[j];
      }
      const auto dx_at = [&](int64_t row, int j, Vector chosen) {
        const Vector value = chosen - same[j] - along_x[j] * normal.centred(row, j);
        put_vector(dx + row * stride + channel + j * S::kWidth, value, call.accumulate[0]);
      };
      each_window(call.plan, lines, [&](int64_t to, const int64_t (&from)[kWindow]) {
        for (int j = 0; j < kVectors; ++j) {
          const Choice best = normal.choose(from, j);
          const Vector dz = best.through(S::load(call.dy + to * stride + channel + j * S::kWidth));
          for (int tap = 0; tap < kWindow; ++tap) dx_at(from[tap], j, best.at(tap, normal.scale[j] * dz));
        }
      });
      each_pixel_outside(call.plan, lines, [&](int64_t row) {
        for (int j = 0; j < kVectors; ++j) dx_at(row, j, Vector{});
      });
    });
  }

  static void tangent(const OpCall<T>& call) {
    const int64_t stride = call.plan.out.stride;
    const T share = mean_share(call);
    T* saved = call.saved_tangent;
    std::fill(saved, saved + 2 * stride, T(0));
    if (call.x_t[0] && !frozen(call)) {
      // x', xh x'
      const T* sums = sum_parts<2>(call, [&](const Lines& lines, int64_t channel, auto vectors, auto& part) {
        constexpr int kVectors = decltype(vectors)::value;
        const Normal<kVectors> normal(call, channel);
        each_pixel(call.plan, lines, [&](int64_t row) {
          for (int j = 0; j < kVectors; ++j) {
            const Vector x_t = S::load(call.x_t[0] + row * stride + channel + j * S::kWidth);
            part[0][j] += x_t;
            part[1][j] += x_t * normal.xh(row, j);
          }
        });
      });
      for (int64_t i = 0; i < 2 * stride; ++i) saved[i] = share * sums[i];
    }
    each_part(call, [&](const Lines& lines, int64_t channel, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      const Normal<kVectors> normal(call, channel);
      const Block<kVectors> gamma_t(call.p_t[0], channel, T(0)), beta_t(call.p_t[1], channel, T(0)),
          mean_t(saved, channel, T(0)), q(saved + stride, channel, T(0));
      each_window(call.plan, lines, [&](int64_t to, const int64_t (&from)[kWindow]) {
        for (int j = 0; j < kVectors; ++j) {
          const Choice best = normal.choose(from, j);
          Vector z_t = gamma_t[j] * best.xh + beta_t[j];
          if (call.x_t[0]) {
            const Vector x_t = best.load(call.x_t[0] + channel + j * S::kWidth, from, stride);
            z_t += normal.scale[j] * (x_t - mean_t[j] - best.xh * q[j]);
          }
          S::store(call.y_t + to * stride + channel + j * S::kWidth, best.through(z_t));
        }
      });
    });
  }

  static void tangent_backward(const OpCall<T>& call) {
    const int64_t stride = call.plan.out.stride;
    const T share = mean_share(call);
    // dz, dz xh, dz', dz' xh + dz xh'
    const T* sums = sum_parts<4>(call, [&](const Lines& lines, int64_t channel, auto vectors, auto& part) {
      constexpr int kVectors = decltype(vectors)::value;
      const NormalTangent<kVectors> normal(call, channel);
      each_window(call.plan, lines, [&](int64_t to, const int64_t (&from)[kWindow]) {
        for (int j = 0; j < kVectors; ++j) {
          const int64_t column = channel + j * S::kWidth;
          const Choice best = normal.choose(from, j);
          const Vector dz = best.through(S::load(call.dy + to * stride + column));
          const Vector dz_t = best.through(S::load(call.dy_t + to * stride + column));
          part[0][j] += dz;
          part[1][j] += dz * best.xh;
          part[2][j] += dz_t;
          part[3][j] += dz_t * best.xh;
          if (call.x_t[0]) part[3][j] += dz * normal.xh_t(best.load(call.x_t[0] + column, from, stride), best.xh, j);
        }
      });
    });
    for (int p = 0; p < 2; ++p)
      if (call.dp_t[p]) add(call.dp_t[p], sums + (3 - p) * stride, stride);
    if (!call.dx_t[0]) return;
    each_part_of_adjoint(call, call.dx_t[0], [&](const Lines& lines, int64_t channel, auto vectors, T* dx_t) {
      constexpr int kVectors = decltype(vectors)::value;
      const NormalTangent<kVectors> normal(call, channel);
      const Block<kVectors> gamma_t(call.p_t[0], channel, T(0)), dz_sum(sums, channel, T(0)),
          dz_xh_sum(sums + stride, channel, T(0)), dz_t_sum(sums + 2 * stride, channel, T(0)),
          mixed_sum(sums + 3 * stride, channel, T(0));
      // With means h = E[gamma dz], hxh = E[gamma dz xh], their tangents and r':
      //   dx' = r' (gamma dz - h - xh hxh) + r (gamma' dz + gamma dz' - h' - xh hxh' - xh' hxh)
      //       = scale_t dz + scale dz' - same - along_x (x - mean) - along_x_t (x' - E[x'])
      Vector scale_t[kVectors], same[kVectors], along_x[kVectors], along_x_t[kVectors];
      for (int j = 0; j < kVectors; ++j) {
        const Vector r = normal.r[j], gamma = normal.gamma[j], r_t = -r * r * normal.q[j];
        const Vector h = share * gamma * dz_sum[j], hxh = share * gamma * dz_xh_sum[j];
        const Vector h_t = share * (gamma_t[j] * dz_sum[j] + gamma * dz_t_sum[j]);
        const Vector hxh_t = share * (gamma_t[j] * dz_xh_sum[j] + gamma * mixed_sum[j]);
        scale_t[j] = r_t * gamma + r * gamma_t[j];
        same[j] = r_t * h + r * h_t;
        along_x[j] = r * (T(2) * r_t * hxh + r * hxh_t);
        along_x_t[j] = r * r * hxh;
      }
      const auto dx_t_at = [&](int64_t row, int j, Vector chosen) {
        const int64_t at = row * stride + channel + j * S::kWidth;
        Vector value = chosen - same[j] - along_x[j] * normal.centred(row, j);
        if (call.x_t[0]) value -= along_x_t[j] * (S::load(call.x_t[0] + at) - normal.mean_t[j]);
        put_vector(dx_t + at, value, call.accumulate[0]);
      };
      each_window(call.plan, lines, [&](int64_t to, const int64_t (&from)[kWindow]) {
        for (int j = 0; j < kVectors; ++j) {
          const int64_t column = channel + j * S::kWidth;
          const Choice best = normal.choose(from, j);
          const Vector dz = S::load(call.dy + to * stride + column), dz_t = S::load(call.dy_t + to * stride + column);
          const Vector chosen = best.through(scale_t[j] * dz + normal.scale[j] * dz_t);
          for (int tap = 0; tap < kWindow; ++tap) dx_t_at(from[tap], j, best.at(tap, chosen));
        }
      });
      each_pixel_outside(call.plan, lines, [&](int64_t row) {
        for (int j = 0; j < kVectors; ++j) dx_t_at(row, j, Vector{});
      });
    });
  }

 private:
  static constexpr int kMaxSums = 4;

  static bool frozen(const OpCall<T>& call) { return call.plan.op.buffer[0] >= 0; }
  static T mean_share(const OpCall<T>& call) { return frozen(call) ? T(0) : T(1) / T(call.plan.in_rows()); }
  static void add(T* target, const T* values, int64_t size) {
    for (int64_t i = 0; i < size; ++i) target[i] += values[i];
  }
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
    const Block<kVectors> mean, r, gamma;
    Vector scale[kVectors], shift[kVectors];  // z = scale x + shift

    Normal(const OpCall<T>& call, int64_t channel)
        : stride(call.plan.out.stride),
          x(call.x[0] + channel),
          mean(call.saved, channel, T(0)),
          r(call.saved + stride, channel, T(0)),
          gamma(call.p[0], channel, T(1)) {
      const Block<kVectors> beta(call.p[1], channel, T(0));
      for (int j = 0; j < kVectors; ++j) {
        scale[j] = gamma[j] * r[j];
        shift[j] = beta[j] - scale[j] * mean[j];
      }
    }

    Vector centred(int64_t row, int j) const { return S::load(x + row * stride + j * S::kWidth) - mean[j]; }
    Vector xh(int64_t row, int j) const { return centred(row, j) * r[j]; }

    // NaN is taken for the largest, once: a loss that is not finite has no backward pass.
    template <bool kFirst = false>
    Choice choose(const int64_t (&from)[kWindow], int j) const {
      Vector best = S::load(x + from[0] * stride + j * S::kWidth);
      Choice choice{scale[j] * best + shift[j], {}, {}};
      for (int i = 1; i < kWindow; ++i) {
        const Vector other = S::load(x + from[i] * stride + j * S::kWidth), z = scale[j] * other + shift[j];
        auto better = z > choice.z;
        if (kFirst) better |= z != z;
        choice.z = better ? z : choice.z;
        best = better ? other : best;
        choice.tap = better ? S::fill(T(i)) : choice.tap;
      }
      choice.xh = (best - mean[j]) * r[j];
      return choice;
    }
  };

  template <int kVectors>
  struct NormalTangent : Normal<kVectors> {
    const Block<kVectors> mean_t, q;
    NormalTangent(const OpCall<T>& call, int64_t channel)
        : Normal<kVectors>(call, channel),
          mean_t(call.saved_tangent, channel, T(0)),
          q(call.saved_tangent + this->stride, channel, T(0)) {}
    Vector xh_t(Vector x_t, Vector xh, int j) const { return this->r[j] * (x_t - mean_t[j] - xh * q[j]); }
  };

  // Lines of y, of all images in order, that are worked on while they are in the first cache.
  struct Lines {
    int first, last;
  };

  // body(lines, first_channel, integral_constant<vectors>): memory is read in order, registers hold one block.
  template <class Body>
  static void each_part(const OpCall<T>& call, const Body& body) {
    each_part_of(call.plan, {0, call.plan.images * call.plan.out.shape.height}, body);
  }
  template <class Body>
  static void each_part_of(const OpPlan<T>& plan, const Lines& all, const Body& body) {
    const int at_once = std::max(1, 32 / plan.out.shape.width);
    for (int first = all.first; first < all.last; first += at_once)
      each_block<T>(plan.out.stride, [&](int64_t channel, auto vectors) {
        body(Lines{first, std::min(all.last, first + at_once)}, channel, vectors);
      });
  }

  // body(lines, first_channel, vectors, where the rows of dx count from)
  template <class Body>
  static void each_part_of_adjoint(const OpCall<T>& call, T* dx, const Body& body) {
    const OpPlan<T>& plan = call.plan;
    const int height = plan.out.shape.height;
    const auto run = [&](const Lines& lines, T* from) {
      each_part_of(plan, lines,
                   [&](const Lines& some, int64_t channel, auto vectors) { body(some, channel, vectors, from); });
    };
    if (!call.reader) return run({0, plan.images * height}, dx);
    for (int image = 0; image < plan.images; ++image) {
      run({image * height, (image + 1) * height}, dx - image * plan.in[0].sample());
      conv2d::take_picture(*call.reader, image);
    }
  }

  // Channel sums [kSums, stride] in the scratch; body(lines, first_channel, vectors, sums) adds to the vectors `sums`.
  template <int kSums, class Body>
  static const T* sum_parts(const OpCall<T>& call, const Body& body) {
    const int64_t stride = call.plan.out.stride;
    T* total = call.scratch;
    std::fill(total, total + kSums * stride, T(0));
    each_part(call, [&](const Lines& lines, int64_t channel, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      Vector part[kSums][kVectors] = {};
      body(lines, channel, vectors, part);
      for (int s = 0; s < kSums; ++s)
        for (int j = 0; j < kVectors; ++j) {
          T* target = total + s * stride + channel + j * S::kWidth;
          S::store(target, S::load(target) + part[s][j]);
        }
    });
    return total;
  }

  // body(row of y, rows of x in its window)
  template <class Body>
  static void each_window(const OpPlan<T>& plan, const Lines& lines, const Body& body) {
    const Shape &in = plan.in[0].shape, &out = plan.out.shape;
    for (int line = lines.first; line < lines.last; ++line) {
      const int64_t to = int64_t{line} * out.width;
      if constexpr (kWindow == 1) {
        for (int x = 0; x < out.width; ++x) body(to + x, {to + x});
      } else {
        const int64_t first = row_of(plan, line);
        for (int x = 0; x < out.width; ++x) {
          const int64_t from = first + 2 * x;
          body(to + x, {from, from + 1, from + in.width, from + in.width + 1});
        }
      }
    }
  }

  // body(row of x): the pixels of the lines' windows, and of what lies outside beside and below them.
  template <class Body>
  static void each_pixel(const OpPlan<T>& plan, const Lines& lines, const Body& body) {
    for (int64_t row = row_of(plan, lines.first), last = row_of(plan, lines.last); row < last; ++row) body(row);
  }

  // The last row and column of an odd picture are in no window.
  template <class Body>
  static void each_pixel_outside(const OpPlan<T>& plan, const Lines& lines, const Body& body) {
    const Shape &in = plan.in[0].shape, &out = plan.out.shape;
    if (kWindow == 1 || (in.height % 2 == 0 && in.width % 2 == 0)) return;
    for (int line = lines.first; line < lines.last; ++line) {
      const int64_t first = row_of(plan, line);
      for (int y = 0; in.width % 2 && y < 2; ++y) body(first + y * in.width + in.width - 1);
      if (in.height % 2 && line % out.height + 1 == out.height)
        for (int x = 0; x < in.width; ++x) body(first + 2 * in.width + x);
    }
  }

  // Where the windows of a line of y begin in x.
  static int64_t row_of(const OpPlan<T>& plan, int line) {
    const Shape &in = plan.in[0].shape, &out = plan.out.shape;
    constexpr int kSide = kPool ? 2 : 1;
    return (int64_t{line / out.height} * in.height + line % out.height * kSide) * in.width;
  }
};

}  // namespace metaaug::METAAUG_ISA
