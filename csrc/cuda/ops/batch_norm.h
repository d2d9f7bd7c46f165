// Batch norm over all pixels of all samples, with the relu and the 2x2 max pool that may follow; a warp takes a
// channel. The formulas are in cpu/ops/batch_norm.h: nothing but y is stored, and which pixel of a window is chosen,
// the first of equal ones, is found from x again.
#pragma once

#include "op.h"

namespace metaaug::cuda {

template <class T, bool kRelu, bool kPool>
class BatchNorm {
  static constexpr int kWindow = kPool ? 4 : 1;

 public:
  // Elements that a channel needs in `saved`: mean, r, variance; in `saved_tangent`: E[x'], q.
  static constexpr int kSaved = 3, kSavedTangent = 2;

  METAAUG_DEVICE explicit BatchNorm(const OpCall<T>& call)
      : call(call),
        node(*call.node),
        in(node.in[0]),
        out(node.out),
        frozen(call.frozen[0] != nullptr),
        in_pixels(in.pixels()),
        out_pixels(out.pixels()),
        share(frozen ? T(0) : T(1) / T(call.images * in_pixels)) {}

  METAAUG_DEVICE void forward() const {
    each_of_warp(in.channels, [&](int channel) {
      const Moments moments =
          frozen ? Moments{call.frozen[0][channel], call.frozen[1][channel]} : find_moments(channel);
      const T r = T(1) / std::sqrt(moments.variance + T(node.op.eps));
      if (lane() == 0) {
        T* saved = call.saved + kSaved * channel;
        saved[0] = moments.mean;
        saved[1] = r;
        saved[2] = moments.variance;
      }
      const Normal normal(call, channel, moments.mean, r);
      each_window(channel, [&](int to, int from) {
        const Choice best = choose<true>(normal, from);
        call.y[to] = kRelu && best.z < T(0) ? T(0) : best.z;
      });
    });
  }

  METAAUG_DEVICE void backward() const {
    each_of_warp(in.channels, [&](int channel) {
      const Normal normal(call, channel);
      T dz_sum = 0, dz_xh_sum = 0;
      each_window(channel, [&](int to, int from) {
        const Choice best = choose(normal, from);
        const T dz = through(best, call.dy[to]);
        dz_sum += dz;
        dz_xh_sum += dz * normal.xh(call.x[0][best.at]);
      });
      dz_sum = warp_sum(dz_sum);
      dz_xh_sum = warp_sum(dz_xh_sum);
      add_affine(call.dp, channel, dz_xh_sum, dz_sum);
      if (!call.dx[0]) return;
      const T same = share * normal.scale * dz_sum, along_x = share * normal.scale * normal.r * dz_xh_sum;
      const auto put = [&](int at, T chosen) {
        call.put_adjoint(call.dx, 0, at, chosen - same - along_x * (call.x[0][at] - normal.mean));
      };
      each_window(channel, [&](int to, int from) {
        const Choice best = choose(normal, from);
        const T chosen = normal.scale * through(best, call.dy[to]);
        for (int i = 0; i < kWindow; ++i) put(tap(from, i), tap(from, i) == best.at ? chosen : T(0));
      });
      each_outside(channel, [&](int at) { put(at, T(0)); });
    });
  }

  METAAUG_DEVICE void tangent() const {
    each_of_warp(in.channels, [&](int channel) {
      const Normal normal(call, channel);
      const T* x_t = call.x_t[0];
      T mean_t = 0, q = 0;
      if (x_t && !frozen) {
        each_pixel(channel, [&](int at) {
          mean_t += x_t[at];
          q += x_t[at] * normal.xh(call.x[0][at]);
        });
        mean_t = share * warp_sum(mean_t);
        q = share * warp_sum(q);
      }
      if (lane() == 0) {
        T* saved = call.saved_tangent + kSavedTangent * channel;
        saved[0] = mean_t;
        saved[1] = q;
      }
      const T gamma_t = value_or(call.p_t[0], channel, T(0)), beta_t = value_or(call.p_t[1], channel, T(0));
      each_window(channel, [&](int to, int from) {
        const Choice best = choose(normal, from);
        const T xh = normal.xh(call.x[0][best.at]);
        const T moved = x_t ? normal.scale * (x_t[best.at] - mean_t - xh * q) : T(0);
        call.y_t[to] = through(best, gamma_t * xh + beta_t + moved);
      });
    });
  }

  METAAUG_DEVICE void tangent_backward() const {
    each_of_warp(in.channels, [&](int channel) {
      const Normal normal(call, channel);
      const T* x_t = call.x_t[0];
      const T mean_t = call.saved_tangent[kSavedTangent * channel], q = call.saved_tangent[kSavedTangent * channel + 1];
      T dz_sum = 0, dz_xh_sum = 0, dz_t_sum = 0, mixed_sum = 0;  // the last: dz' xh + dz xh'
      each_window(channel, [&](int to, int from) {
        const Choice best = choose(normal, from);
        const T dz = through(best, call.dy[to]), dz_t = through(best, call.dy_t[to]);
        const T xh = normal.xh(call.x[0][best.at]);
        dz_sum += dz;
        dz_xh_sum += dz * xh;
        dz_t_sum += dz_t;
        mixed_sum += dz_t * xh;
        if (x_t) mixed_sum += dz * normal.r * (x_t[best.at] - mean_t - xh * q);
      });
      dz_sum = warp_sum(dz_sum);
      dz_xh_sum = warp_sum(dz_xh_sum);
      dz_t_sum = warp_sum(dz_t_sum);
      mixed_sum = warp_sum(mixed_sum);
      add_affine(call.dp_t, channel, mixed_sum, dz_t_sum);
      if (!call.dx_t[0]) return;
      // dx' = scale_t dz + scale dz' - same - along_x (x - mean) - along_x_t (x' - E[x'])
      const T gamma_t = value_or(call.p_t[0], channel, T(0)), r = normal.r, r_t = -r * r * q;
      const T h = share * normal.gamma * dz_sum, hxh = share * normal.gamma * dz_xh_sum;
      const T h_t = share * (gamma_t * dz_sum + normal.gamma * dz_t_sum);
      const T hxh_t = share * (gamma_t * dz_xh_sum + normal.gamma * mixed_sum);
      const T scale_t = r_t * normal.gamma + r * gamma_t, same = r_t * h + r * h_t;
      const T along_x = r * (T(2) * r_t * hxh + r * hxh_t), along_x_t = r * r * hxh;
      const auto put = [&](int at, T chosen) {
        T value = chosen - same - along_x * (call.x[0][at] - normal.mean);
        if (x_t) value -= along_x_t * (x_t[at] - mean_t);
        call.put_adjoint(call.dx_t, 0, at, value);
      };
      each_window(channel, [&](int to, int from) {
        const Choice best = choose(normal, from);
        const T chosen = through(best, scale_t * call.dy[to] + normal.scale * call.dy_t[to]);
        for (int i = 0; i < kWindow; ++i) put(tap(from, i), tap(from, i) == best.at ? chosen : T(0));
      });
      each_outside(channel, [&](int at) { put(at, T(0)); });
    });
  }

 private:
  struct Moments {
    T mean, variance;
  };

  // xh = (x - mean) r and z = gamma xh + beta of a channel.
  struct Normal {
    T mean, r, gamma, scale, beta;
    METAAUG_DEVICE Normal(const OpCall<T>& call, int channel, T mean, T r)
        : mean(mean),
          r(r),
          gamma(value_or(call.p[0], channel, T(1))),
          scale(gamma * r),
          beta(value_or(call.p[1], channel, T(0))) {}
    METAAUG_DEVICE Normal(const OpCall<T>& call, int channel)
        : Normal(call, channel, call.saved[kSaved * channel], call.saved[kSaved * channel + 1]) {}
    METAAUG_DEVICE T xh(T x) const { return (x - mean) * r; }
    METAAUG_DEVICE T z(T x) const { return scale * (x - mean) + beta; }
  };

  // The pixel of a window whose z is largest.
  struct Choice {
    T z;
    int at;
  };

  METAAUG_DEVICE int tap(int from, int i) const { return from + i / 2 * in.width + i % 2; }

  // NaN is taken for the largest, once: a loss that is not finite has no backward pass.
  template <bool kFirst = false>
  METAAUG_DEVICE Choice choose(const Normal& normal, int from) const {
    Choice best{normal.z(call.x[0][from]), from};
    for (int i = 1; i < kWindow; ++i) {
      const T z = normal.z(call.x[0][tap(from, i)]);
      if (z > best.z || (kFirst && z != z)) best = {z, tap(from, i)};
    }
    return best;
  }

  // What of an adjoint or a tangent passes the relu.
  METAAUG_DEVICE static T through(const Choice& best, T value) { return kRelu && !(best.z > T(0)) ? T(0) : value; }

  // Calls body(output, first input) for what the lane has of a channel's windows.
  template <class Body>
  METAAUG_DEVICE void each_window(int channel, const Body& body) const {
    for (int j = lane(); j < call.images * out_pixels; j += kWarp) {
      const int n = node.by_out_pixels(j), pixel = node.by_out_pixels.rest(j, n), plane = n * in.channels + channel;
      const int row = kPool ? node.by_out_width(pixel) : 0;
      body(plane * out_pixels + pixel,
           plane * in_pixels + (kPool ? 2 * (row * in.width + node.by_out_width.rest(pixel, row)) : pixel));
    }
  }

  template <class Body>
  METAAUG_DEVICE void each_pixel(int channel, const Body& body) const {
    for (int j = lane(); j < call.images * in_pixels; j += kWarp) {
      const int n = node.by_in_pixels(j);
      body((n * in.channels + channel) * in_pixels + node.by_in_pixels.rest(j, n));
    }
  }

  // Pixels in no window: the last row of an odd height, the last column of an odd width.
  template <class Body>
  METAAUG_DEVICE void each_outside(int channel, const Body& body) const {
    if (!kPool || in_pixels == kWindow * out_pixels) return;
    each_pixel(channel, [&](int at) {
      const int pixel = at % in_pixels, row = pixel / in.width;
      if (row >= 2 * out.height || pixel - row * in.width >= 2 * out.width) body(at);
    });
  }

  // In one pass, from a value near the mean: the mean of the first few.
  METAAUG_DEVICE Moments find_moments(int channel) const {
    const int count = call.images * in_pixels, few = count < kWarp ? count : kWarp;
    const int n = node.by_in_pixels(lane() < few ? lane() : 0);
    const int mine = (n * in.channels + channel) * in_pixels + node.by_in_pixels.rest(lane() < few ? lane() : 0, n);
    const T near = warp_sum(lane() < few ? call.x[0][mine] : T(0)) / T(few);
    T sum = 0, squares = 0;
    each_pixel(channel, [&](int at) {
      const T d = call.x[0][at] - near;
      sum += d;
      squares += d * d;
    });
    const T d = share * warp_sum(sum), variance = share * warp_sum(squares) - d * d;
    return {near + d, variance < T(0) ? T(0) : variance};
  }

  METAAUG_DEVICE void add_affine(T* const* to, int channel, T dgamma, T dbeta) const {
    if (lane() != 0) return;
    if (to[0]) call.add_gradient(to, 0, channel, dgamma);
    if (to[1]) call.add_gradient(to, 1, channel, dbeta);
  }

  const OpCall<T>& call;
  const Node& node;
  const Shape &in, &out;
  const bool frozen;
  const int in_pixels, out_pixels;
  const T share;
};

}  // namespace metaaug::cuda
