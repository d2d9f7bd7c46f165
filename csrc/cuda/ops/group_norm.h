// Layer and group norm: a warp takes the values of one sample that are normalised together, and for the affine's
// gradient those that an affine multiplies. The formulas are batch norm's.
#pragma once

#include "op.h"

namespace metaaug::cuda {

template <class T>
class GroupNorm {
 public:
  // Elements that a set needs in `saved`: mean, r; in `saved_tangent`: E[x'], q.
  static constexpr int kSaved = 2, kSavedTangent = 2;

  METAAUG_DEVICE explicit GroupNorm(const OpCall<T>& call)
      : call(call),
        node(*call.node),
        by_element(node.op.kind == OpKind::kLayerNorm),
        pixels(node.out.pixels()),
        sample(int(node.out.size())),
        sets(call.images * node.op.groups),
        size(sample / node.op.groups) {}

  METAAUG_DEVICE void forward() const {
    each_of_warp(sets, [&](int set) {
      const T mean = this->mean([&](int i) { return call.x[0][i]; }, set);
      const T variance = this->mean([&](int i) { return (call.x[0][i] - mean) * (call.x[0][i] - mean); }, set);
      const T r = T(1) / std::sqrt(variance + T(node.op.eps));
      if (lane() == 0) {
        T* saved = call.saved + kSaved * set;
        saved[0] = mean;
        saved[1] = r;
      }
      each_in(set, [&](int i) {
        const int a = affine(i);
        call.y[i] = (call.x[0][i] - mean) * r * value_or(call.p[0], a, T(1)) + value_or(call.p[1], a, T(0));
      });
    });
  }

  METAAUG_DEVICE void backward() const {
    if (call.dx[0]) {
      each_of_warp(sets, [&](int set) {
        const Statistics s = statistics(set);
        const auto h = [&](int i) { return value_or(call.p[0], affine(i), T(1)) * call.dy[i]; };
        const T mean_h = mean(h, set);
        const T mean_h_xh = mean([&](int i) { return h(i) * xh(s, i); }, set);
        each_in(set, [&](int i) { call.put_adjoint(call.dx, 0, i, s.r * (h(i) - mean_h - xh(s, i) * mean_h_xh)); });
      });
    }
    add_affine(call.dp, 0, [&](int i) { return call.dy[i] * xh(statistics(set_of(i)), i); });
    add_affine(call.dp, 1, [&](int i) { return call.dy[i]; });
  }

  METAAUG_DEVICE void tangent() const {
    each_of_warp(sets, [&](int set) {
      const Statistics s = statistics(set);
      T* saved = call.saved_tangent + kSavedTangent * set;
      Tangents t{T(0), T(0)};
      if (call.x_t[0]) {
        t.mean = mean([&](int i) { return call.x_t[0][i]; }, set);
        t.q = mean([&](int i) { return call.x_t[0][i] * xh(s, i); }, set);
      }
      if (lane() == 0) {
        saved[0] = t.mean;
        saved[1] = t.q;
      }
      each_in(set, [&](int i) {
        const int a = affine(i);
        call.y_t[i] = value_or(call.p_t[0], a, T(0)) * xh(s, i) + value_or(call.p[0], a, T(1)) * xh_t(s, t, i) +
                      value_or(call.p_t[1], a, T(0));
      });
    });
  }

  METAAUG_DEVICE void tangent_backward() const {
    if (call.dx_t[0]) {
      each_of_warp(sets, [&](int set) {
        const Statistics s = statistics(set);
        const Tangents t = tangents(set);
        const auto h = [&](int i) { return value_or(call.p[0], affine(i), T(1)) * call.dy[i]; };
        const auto h_t = [&](int i) {
          const int a = affine(i);
          return value_or(call.p_t[0], a, T(0)) * call.dy[i] + value_or(call.p[0], a, T(1)) * call.dy_t[i];
        };
        const T mean_h = mean(h, set), mean_h_t = mean(h_t, set);
        const T mean_h_xh = mean([&](int i) { return h(i) * xh(s, i); }, set);
        const T mean_h_xh_t = mean([&](int i) { return h_t(i) * xh(s, i) + h(i) * xh_t(s, t, i); }, set);
        const T r_t = -s.r * s.r * t.q;
        each_in(set, [&](int i) {
          const T x = xh(s, i), moved = h_t(i) - mean_h_t - xh_t(s, t, i) * mean_h_xh - x * mean_h_xh_t;
          call.put_adjoint(call.dx_t, 0, i, r_t * (h(i) - mean_h - x * mean_h_xh) + s.r * moved);
        });
      });
    }
    add_affine(call.dp_t, 0, [&](int i) {
      const int set = set_of(i);
      const Statistics s = statistics(set);
      return call.dy_t[i] * xh(s, i) + call.dy[i] * xh_t(s, tangents(set), i);
    });
    add_affine(call.dp_t, 1, [&](int i) { return call.dy_t[i]; });
  }

 private:
  struct Statistics {
    T mean, r;
  };
  struct Tangents {
    T mean, q;
  };

  METAAUG_DEVICE Statistics statistics(int set) const {
    return {call.saved[kSaved * set], call.saved[kSaved * set + 1]};
  }
  METAAUG_DEVICE Tangents tangents(int set) const {
    return {call.saved_tangent[kSavedTangent * set], call.saved_tangent[kSavedTangent * set + 1]};
  }
  METAAUG_DEVICE T xh(const Statistics& s, int i) const { return (call.x[0][i] - s.mean) * s.r; }
  METAAUG_DEVICE T xh_t(const Statistics& s, const Tangents& t, int i) const {
    return call.x_t[0] ? s.r * (call.x_t[0][i] - t.mean - xh(s, i) * t.q) : T(0);
  }

  METAAUG_DEVICE int affine(int i) const { return by_element ? i % sample : i % sample / pixels; }
  METAAUG_DEVICE int set_of(int i) const { return i / size; }

  // Calls body(element) for what the lane has of a set.
  template <class Body>
  METAAUG_DEVICE void each_in(int set, const Body& body) const {
    for (int j = lane(); j < size; j += kWarp) body(set * size + j);
  }

  template <class Value>
  METAAUG_DEVICE T mean(const Value& value, int set) const {
    T sum = 0;
    each_in(set, [&](int i) { sum += value(i); });
    return warp_sum(sum) / T(size);
  }

  // Adds each affine's sum of value(element): of one element of all samples, or of a channel of them.
  template <class Value>
  METAAUG_DEVICE void add_affine(T* const* to, int j, const Value& value) const {
    if (!to[j]) return;
    const int each = by_element ? 1 : pixels;
    each_of_warp(by_element ? sample : node.out.channels, [&](int a) {
      T sum = 0;
      for (int i = lane(); i < call.images * each; i += kWarp) sum += value(i / each * sample + a * each + i % each);
      sum = warp_sum(sum);
      if (lane() == 0) call.add_gradient(to, j, a, sum);
    });
  }

  const OpCall<T>& call;
  const Node& node;
  const bool by_element;
  const int pixels, sample, sets, size;
};

}  // namespace metaaug::cuda
