// Ops that are linear in x with no parameters: the tangent is the forward, the tangent of the backward the backward.
// Each gives `map` (y from x) and `adjoint` (dx from dy). Max pool is one for fixed choices, dropout for a fixed mask.
#pragma once

#include "two_inputs.h"

namespace metaaug::METAAUG_ISA {

template <class T, class Map>
struct LinearMap {
  static void plan(OpPlan<T>& plan) { Map::plan(plan); }
  static void forward(const OpCall<T>& call) {
    Map::prepare(call);
    Map::map(call, call.x, call.y);
  }
  static void backward(const OpCall<T>& call) { Map::adjoint(call, call.dy, call.dx); }
  static void tangent(const OpCall<T>& call) { Map::map(call, call.x_t, call.y_t); }
  static void tangent_backward(const OpCall<T>& call) { Map::adjoint(call, call.dy_t, call.dx_t); }
};

// Channels last to torch's order of a flattened picture.
template <class T>
struct Flatten {
  static void plan(OpPlan<T>&) {}
  static void prepare(const OpCall<T>&) {}
  static void map(const OpCall<T>& call, const T* const* x, T* y) {
    const Layout &in = call.plan.in[0], &out = call.plan.out;
    const int pixels = in.shape.pixels();
    for (int n = 0; n < call.plan.images; ++n) {
      const T* from = x[0] + n * in.sample();
      T* to = y + n * out.stride;
      for (int c = 0; c < in.shape.channels; ++c)
        for (int i = 0; i < pixels; ++i) to[int64_t{c} * pixels + i] = from[i * in.stride + c];
      std::fill(to + out.shape.channels, to + out.stride, T(0));
    }
  }
  static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (!dx[0]) return;
    const Layout &in = call.plan.in[0], &out = call.plan.out;
    const int pixels = in.shape.pixels();
    for (int n = 0; n < call.plan.images; ++n)
      for (int i = 0; i < pixels; ++i) {
        T* to = dx[0] + n * in.sample() + i * in.stride;
        for (int c = 0; c < in.shape.channels; ++c)
          put(to + c, dy[n * out.stride + int64_t{c} * pixels + i], call.accumulate[0]);
        if (!call.accumulate[0]) std::fill(to + in.shape.channels, to + in.stride, T(0));
      }
  }
};

template <class T>
struct Add {
  static void plan(OpPlan<T>&) {}
  static void prepare(const OpCall<T>&) {}
  static void map(const OpCall<T>& call, const T* const* x, T* y) {
    each_of_two(call.plan, [&](int64_t i, int64_t j) { y[i] = (x[0] ? x[0][i] : T(0)) + (x[1] ? x[1][j] : T(0)); });
  }
  static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (dx[0]) each_of_two(call.plan, [&](int64_t i, int64_t) { put(dx[0] + i, dy[i], call.accumulate[0]); });
    if (dx[1]) put_second(call, dx[1], [&](int64_t i) { return dy[i]; });
  }
};

// The mask, scaled by 1 / (1 - p), is drawn by counter in the user's element order.
template <class T>
struct Dropout {
  static void plan(OpPlan<T>& plan) { plan.saved = plan.rows() * plan.out.stride; }
  static void prepare(const OpCall<T>& call) {
    const Layout& out = call.plan.out;
    const double p = call.plan.op.scalar[0];
    const T scale = p < 1 ? T(1 / (1 - p)) : T(0);
    const int pixels = out.shape.pixels();
    for (int64_t row = 0; row < call.plan.rows(); ++row)
      for (int c = 0; c < out.stride; ++c) {
        const int64_t element = (row / pixels * out.shape.channels + c) * pixels + row % pixels;
        const bool keep = c < out.shape.channels && dropout_uniform(call.key, uint32_t(element)) >= p;
        call.saved[row * out.stride + c] = keep ? scale : T(0);
      }
  }
  static void map(const OpCall<T>& call, const T* const* x, T* y) {
    const int64_t size = call.plan.rows() * call.plan.out.stride;
    for (int64_t i = 0; i < size; ++i) y[i] = x[0][i] * call.saved[i];
  }
  static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (!dx[0]) return;
    const int64_t size = call.plan.rows() * call.plan.out.stride;
    for (int64_t i = 0; i < size; ++i) put(dx[0] + i, dy[i] * call.saved[i], call.accumulate[0]);
  }
};

}  // namespace metaaug::METAAUG_ISA
