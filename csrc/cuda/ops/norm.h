// Batch norm over a channel of all samples; layer and group norm over a part of one sample. A warp takes a set of
// values that are normalised together, and for the affine's gradient, an affine's values.
//
//   xh = (x - mean) r,  r = 1 / sqrt(var + eps),  y = gamma xh + beta
//   backward: h = gamma dy;  dx = r (h - E[h] - xh E[h xh]);  dgamma = sum dy xh;  dbeta = sum dy
//   tangents: q = E[xh x'];  xh' = r (x' - E[x'] - xh q);  r' = -r^2 q; the rest by the product rule.
//
// With frozen statistics mean and r are constants: the terms with E[] vanish and xh' = r x'.
#pragma once

#include "op.h"

namespace metaaug::cuda {

template <class T>
class Norm {
 public:
  // Elements that a set needs in `saved`: mean, r, variance; in `saved_tangent`: E[x'], q.
  static constexpr int kSaved = 3, kSavedTangent = 2;

  METAAUG_DEVICE explicit Norm(const OpCall<T>& call)
      : call(call),
        node(*call.node),
        by_channel(node.op.kind == OpKind::kBatchNorm),
        by_element(node.op.kind == OpKind::kLayerNorm),
        frozen(call.frozen[0] != nullptr),
        pixels(node.out.pixels()),
        sample(node.out.size()),
        sets(by_channel ? node.out.channels : int64_t{call.images} * node.op.groups),
        size(by_channel ? int64_t{call.images} * pixels : sample / node.op.groups) {}

  METAAUG_DEVICE void forward() const {
    each_of_warp(sets, [&](int64_t set) {
      T mean, variance;
      if (frozen) {
        mean = call.frozen[0][set];
        variance = call.frozen[1][set];
      } else {
        mean = this->mean([&](int64_t i) { return call.x[0][i]; }, set);
        variance = this->mean([&](int64_t i) { return (call.x[0][i] - mean) * (call.x[0][i] - mean); }, set);
      }
      const T r = T(1) / std::sqrt(variance + T(node.op.eps));
      if (lane() == 0) {
        T* saved = call.saved + kSaved * set;
        saved[0] = mean;
        saved[1] = r;
        saved[2] = variance;
      }
      each_in(set, [&](int64_t i) {
        const int64_t a = affine(i);
        call.y[i] = (call.x[0][i] - mean) * r * value_or(call.p[0], a, T(1)) + value_or(call.p[1], a, T(0));
      });
    });
  }

  METAAUG_DEVICE void backward() const {
    if (call.dx[0]) {
      each_of_warp(sets, [&](int64_t set) {
        const Statistics s = statistics(set);
        const auto h = [&](int64_t i) { return value_or(call.p[0], affine(i), T(1)) * call.dy[i]; };
        const T mean_h = mean_unless_frozen(h, set);
        const T mean_h_xh = mean_unless_frozen([&](int64_t i) { return h(i) * xh(s, i); }, set);
        each_in(set, [&](int64_t i) {
          put(call.dx[0] + i, s.r * (h(i) - mean_h - xh(s, i) * mean_h_xh), call.accumulate[0]);
        });
      });
    }
    add_affine(call.dp[0], [&](int64_t i) { return call.dy[i] * xh(statistics(set_of(i)), i); });
    add_affine(call.dp[1], [&](int64_t i) { return call.dy[i]; });
  }

  METAAUG_DEVICE void tangent() const {
    each_of_warp(sets, [&](int64_t set) {
      const Statistics s = statistics(set);
      T* saved = call.saved_tangent + kSavedTangent * set;
      Tangents t{T(0), T(0)};
      if (call.x_t[0]) {
        t.mean = mean_unless_frozen([&](int64_t i) { return call.x_t[0][i]; }, set);
        t.q = mean_unless_frozen([&](int64_t i) { return call.x_t[0][i] * xh(s, i); }, set);
      }
      if (lane() == 0) {
        saved[0] = t.mean;
        saved[1] = t.q;
      }
      each_in(set, [&](int64_t i) {
        const int64_t a = affine(i);
        call.y_t[i] = value_or(call.p_t[0], a, T(0)) * xh(s, i) + value_or(call.p[0], a, T(1)) * xh_t(s, t, i) +
                      value_or(call.p_t[1], a, T(0));
      });
    });
  }

  METAAUG_DEVICE void tangent_backward() const {
    if (call.dx_t[0]) {
      each_of_warp(sets, [&](int64_t set) {
        const Statistics s = statistics(set);
        const Tangents t = tangents(set);
        const auto h = [&](int64_t i) { return value_or(call.p[0], affine(i), T(1)) * call.dy[i]; };
        const auto h_t = [&](int64_t i) {
          const int64_t a = affine(i);
          return value_or(call.p_t[0], a, T(0)) * call.dy[i] + value_or(call.p[0], a, T(1)) * call.dy_t[i];
        };
        const T mean_h = mean_unless_frozen(h, set), mean_h_t = mean_unless_frozen(h_t, set);
        const T mean_h_xh = mean_unless_frozen([&](int64_t i) { return h(i) * xh(s, i); }, set);
        const T mean_h_xh_t =
            mean_unless_frozen([&](int64_t i) { return h_t(i) * xh(s, i) + h(i) * xh_t(s, t, i); }, set);
        const T r_t = -s.r * s.r * t.q;
        each_in(set, [&](int64_t i) {
          const T x = xh(s, i), moved = h_t(i) - mean_h_t - xh_t(s, t, i) * mean_h_xh - x * mean_h_xh_t;
          put(call.dx_t[0] + i, r_t * (h(i) - mean_h - x * mean_h_xh) + s.r * moved, call.accumulate[0]);
        });
      });
    }
    add_affine(call.dp_t[0], [&](int64_t i) {
      const int64_t set = set_of(i);
      const Statistics s = statistics(set);
      return call.dy_t[i] * xh(s, i) + call.dy[i] * xh_t(s, tangents(set), i);
    });
    add_affine(call.dp_t[1], [&](int64_t i) { return call.dy_t[i]; });
  }

 private:
  struct Statistics {
    T mean, r;
  };
  struct Tangents {
    T mean, q;
  };

  METAAUG_DEVICE Statistics statistics(int64_t set) const {
    return {call.saved[kSaved * set], call.saved[kSaved * set + 1]};
  }
  METAAUG_DEVICE Tangents tangents(int64_t set) const {
    return {call.saved_tangent[kSavedTangent * set], call.saved_tangent[kSavedTangent * set + 1]};
  }
  METAAUG_DEVICE T xh(const Statistics& s, int64_t i) const { return (call.x[0][i] - s.mean) * s.r; }
  METAAUG_DEVICE T xh_t(const Statistics& s, const Tangents& t, int64_t i) const {
    return call.x_t[0] ? s.r * (call.x_t[0][i] - t.mean - xh(s, i) * t.q) : T(0);
  }

  METAAUG_DEVICE int64_t affine(int64_t i) const { return by_element ? i % sample : i % sample / pixels; }
  METAAUG_DEVICE int64_t set_of(int64_t i) const { return by_channel ? i % sample / pixels : i / size; }

  template <class Body>
  METAAUG_DEVICE static void each_of_warp(int64_t count, const Body& body) {
    for (int64_t i = warp(); i < count; i += warps()) body(i);
  }

  // Calls body(element) for what the lane has of the values of one channel.
  template <class Body>
  METAAUG_DEVICE void each_of_channel(int64_t channel, const Body& body) const {
    const int64_t count = int64_t{call.images} * pixels;
    for (int64_t j = lane(); j < count; j += kWarp) body(j / pixels * sample + channel * pixels + j % pixels);
  }

  template <class Body>
  METAAUG_DEVICE void each_in(int64_t set, const Body& body) const {
    if (by_channel) return each_of_channel(set, body);
    for (int64_t j = lane(); j < size; j += kWarp) body(set * size + j);
  }

  template <class Value>
  METAAUG_DEVICE T mean(const Value& value, int64_t set) const {
    T sum = 0;
    each_in(set, [&](int64_t i) { sum += value(i); });
    return warp_sum(sum) / T(size);
  }

  template <class Value>
  METAAUG_DEVICE T mean_unless_frozen(const Value& value, int64_t set) const {
    return frozen ? T(0) : mean(value, set);
  }

  // Adds each affine's sum of value(element).
  template <class Value>
  METAAUG_DEVICE void add_affine(T* target, const Value& value) const {
    if (!target) return;
    each_of_warp(by_element ? sample : node.out.channels, [&](int64_t a) {
      T sum = 0;
      const auto add = [&](int64_t i) { sum += value(i); };
      if (by_element)
        for (int64_t n = lane(); n < call.images; n += kWarp) add(n * sample + a);
      else
        each_of_channel(a, add);
      sum = warp_sum(sum);
      if (lane() == 0) target[a] += sum;
    });
  }

  const OpCall<T>& call;
  const Node& node;
  const bool by_channel, by_element, frozen;
  const int pixels;
  const int64_t sample, sets, size;
};

}  // namespace metaaug::cuda
