// Group norm, and layer norm over all of a sample as its one-group case with an affine for each element.
// Formulas as in batch_norm.h, a set being one sample's group: [pixels, channels / groups].
#pragma once

#include "op.h"

namespace metaaug::METAAUG_ISA {
namespace group_norm {

// saved: mean, r of each set.  saved_tangent: E[x'], q of each set.
template <class T>
void plan(OpPlan<T>& plan) {
  plan.saved = 2 * int64_t{plan.images} * plan.op.groups;
  plan.saved_tangent = plan.saved;
}

// Calls body(set, visit), where visit(f) calls f(element's offset, its affine's offset) over the set.
template <class T, class Body>
void each_set(const OpPlan<T>& plan, const Body& body) {
  const int width = plan.out.shape.channels / plan.op.groups, pixels = plan.out.shape.pixels();
  const int64_t stride = plan.out.stride;
  const bool by_element = plan.op.kind == OpKind::kLayerNorm;
  for (int n = 0; n < plan.images; ++n)
    for (int g = 0; g < plan.op.groups; ++g)
      body(int64_t{n} * plan.op.groups + g, [&](const auto& f) {
        for (int pixel = 0; pixel < pixels; ++pixel)
          for (int c = g * width; c < (g + 1) * width; ++c)
            f((int64_t{n} * pixels + pixel) * stride + c, by_element ? pixel * stride + c : c);
      });
}

template <class T>
T set_size(const OpPlan<T>& plan) {
  return T(plan.out.shape.channels / plan.op.groups * plan.out.shape.pixels());
}

template <class T>
T value_or(const T* source, int64_t at, T absent) {
  return source ? source[at] : absent;
}

template <class T>
void clear_padding(const OpPlan<T>& plan, T* target) {
  for (int64_t row = 0; row < plan.rows(); ++row)
    std::fill(target + row * plan.out.stride + plan.out.shape.channels, target + (row + 1) * plan.out.stride, T(0));
}

template <class T>
void forward(const OpCall<T>& call) {
  const T size = set_size(call.plan), eps = T(call.plan.op.eps);
  clear_padding(call.plan, call.y);
  each_set(call.plan, [&](int64_t set, const auto& visit) {
    T mean = 0, square = 0;
    visit([&](int64_t i, int64_t) { mean += call.x[0][i]; });
    mean /= size;
    visit([&](int64_t i, int64_t) { square += (call.x[0][i] - mean) * (call.x[0][i] - mean); });
    const T r = T(1) / std::sqrt(square / size + eps);
    call.saved[2 * set] = mean;
    call.saved[2 * set + 1] = r;
    visit([&](int64_t i, int64_t a) {
      call.y[i] = (call.x[0][i] - mean) * r * value_or(call.p[0], a, T(1)) + value_or(call.p[1], a, T(0));
    });
  });
}

template <class T>
void backward(const OpCall<T>& call) {
  const T size = set_size(call.plan);
  if (call.dx[0] && !call.accumulate[0]) clear_padding(call.plan, call.dx[0]);
  each_set(call.plan, [&](int64_t set, const auto& visit) {
    const T mean = call.saved[2 * set], r = call.saved[2 * set + 1];
    T h = 0, hxh = 0;
    visit([&](int64_t i, int64_t a) {
      const T xh = (call.x[0][i] - mean) * r, gamma_dy = value_or(call.p[0], a, T(1)) * call.dy[i];
      h += gamma_dy;
      hxh += gamma_dy * xh;
      if (call.dp[0]) call.dp[0][a] += call.dy[i] * xh;
      if (call.dp[1]) call.dp[1][a] += call.dy[i];
    });
    if (!call.dx[0]) return;
    h /= size;
    hxh /= size;
    visit([&](int64_t i, int64_t a) {
      const T xh = (call.x[0][i] - mean) * r;
      put(call.dx[0] + i, r * (value_or(call.p[0], a, T(1)) * call.dy[i] - h - xh * hxh), call.accumulate[0]);
    });
  });
}

template <class T>
void tangent(const OpCall<T>& call) {
  const T size = set_size(call.plan);
  clear_padding(call.plan, call.y_t);
  each_set(call.plan, [&](int64_t set, const auto& visit) {
    const T mean = call.saved[2 * set], r = call.saved[2 * set + 1];
    T mean_t = 0, q = 0;
    if (call.x_t[0]) {
      visit([&](int64_t i, int64_t) {
        mean_t += call.x_t[0][i];
        q += call.x_t[0][i] * (call.x[0][i] - mean) * r;
      });
    }
    call.saved_tangent[2 * set] = mean_t /= size;
    call.saved_tangent[2 * set + 1] = q /= size;
    visit([&](int64_t i, int64_t a) {
      const T xh = (call.x[0][i] - mean) * r;
      const T xh_t = call.x_t[0] ? r * (call.x_t[0][i] - mean_t - xh * q) : T(0);
      call.y_t[i] =
          value_or(call.p_t[0], a, T(0)) * xh + value_or(call.p[0], a, T(1)) * xh_t + value_or(call.p_t[1], a, T(0));
    });
  });
}

template <class T>
void tangent_backward(const OpCall<T>& call) {
  const T size = set_size(call.plan);
  if (call.dx_t[0] && !call.accumulate[0]) clear_padding(call.plan, call.dx_t[0]);
  each_set(call.plan, [&](int64_t set, const auto& visit) {
    const T mean = call.saved[2 * set], r = call.saved[2 * set + 1];
    const T mean_t = call.saved_tangent[2 * set], q = call.saved_tangent[2 * set + 1], r_t = -r * r * q;
    const auto xh_at = [&](int64_t i) { return (call.x[0][i] - mean) * r; };
    const auto xh_t_at = [&](int64_t i) { return call.x_t[0] ? r * (call.x_t[0][i] - mean_t - xh_at(i) * q) : T(0); };
    const auto h_t_at = [&](int64_t i, int64_t a) {
      return value_or(call.p_t[0], a, T(0)) * call.dy[i] + value_or(call.p[0], a, T(1)) * call.dy_t[i];
    };
    T h = 0, hxh = 0, h_t = 0, hxh_t = 0;
    visit([&](int64_t i, int64_t a) {
      const T xh = xh_at(i), xh_t = xh_t_at(i), gamma_dy = value_or(call.p[0], a, T(1)) * call.dy[i];
      h += gamma_dy;
      hxh += gamma_dy * xh;
      h_t += h_t_at(i, a);
      hxh_t += h_t_at(i, a) * xh + gamma_dy * xh_t;
      if (call.dp_t[0]) call.dp_t[0][a] += call.dy_t[i] * xh + call.dy[i] * xh_t;
      if (call.dp_t[1]) call.dp_t[1][a] += call.dy_t[i];
    });
    if (!call.dx_t[0]) return;
    h /= size;
    hxh /= size;
    h_t /= size;
    hxh_t /= size;
    visit([&](int64_t i, int64_t a) {
      const T xh = xh_at(i), gamma_dy = value_or(call.p[0], a, T(1)) * call.dy[i];
      const T moved = h_t_at(i, a) - h_t - xh_t_at(i) * hxh - xh * hxh_t;
      put(call.dx_t[0] + i, r_t * (gamma_dy - h - xh * hxh) + r * moved, call.accumulate[0]);
    });
  });
}

}  // namespace group_norm
}  // namespace metaaug::METAAUG_ISA
