// Max, average and mean pooling, channels last.
#pragma once

#include "linear_map.h"

namespace metaaug::METAAUG_ISA {

// Calls body(y's row, x's row, tap) for every input pixel inside every window, in the order of torch.
template <class T, class Body>
void each_tap(const OpPlan<T>& plan, const Body& body) {
  const Op& op = plan.op;
  const Shape &in = plan.in[0].shape, &out = plan.out.shape;
  for (int n = 0; n < plan.images; ++n)
    for (int y = 0; y < out.height; ++y)
      for (int x = 0; x < out.width; ++x)
        for (int tap = 0; tap < op.kernel.y * op.kernel.x; ++tap) {
          const int iy = y * op.stride.y - op.padding.y + tap / op.kernel.x;
          const int ix = x * op.stride.x - op.padding.x + tap % op.kernel.x;
          if (iy < 0 || iy >= in.height || ix < 0 || ix >= in.width) continue;
          body((int64_t{n} * out.height + y) * out.width + x, (int64_t{n} * in.height + iy) * in.width + ix, tap);
        }
}

// Before an adjoint that adds, window by window.
template <class T>
void clear_unless_accumulating(const OpCall<T>& call, T* dx) {
  if (!call.accumulate[0]) std::fill(dx, dx + call.plan.images * call.plan.in[0].sample(), T(0));
}

// saved: the chosen tap of every element. The first of equal maxima wins, and NaN wins over all, as in torch.
template <class T>
struct MaxPool {
  static void plan(OpPlan<T>& plan) { plan.saved = plan.rows() * plan.out.stride; }
  static void prepare(const OpCall<T>& call) {
    const int64_t stride = call.plan.out.stride;
    std::fill(call.saved, call.saved + call.plan.saved, T(-1));
    each_tap(call.plan, [&](int64_t to, int64_t from, int tap) {
      const T* x = call.x[0] + from * stride;
      T *best = call.y + to * stride, *choice = call.saved + to * stride;
      for (int64_t c = 0; c < stride; ++c) {
        const bool better = choice[c] < T(0) || x[c] > best[c] || x[c] != x[c];
        best[c] = better ? x[c] : best[c];
        choice[c] = better ? T(tap) : choice[c];
      }
    });
  }
  static void map(const OpCall<T>& call, const T* const* x, T* y) {
    if (y == call.y) return;  // `prepare` has left the maxima there
    const int64_t stride = call.plan.out.stride;
    each_tap(call.plan, [&](int64_t to, int64_t from, int tap) {
      const T *in = x[0] + from * stride, *choice = call.saved + to * stride;
      T* out = y + to * stride;
      for (int64_t c = 0; c < stride; ++c) out[c] = choice[c] == T(tap) ? in[c] : out[c];
    });
  }
  static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (!dx[0]) return;
    const int64_t stride = call.plan.out.stride;
    clear_unless_accumulating(call, dx[0]);
    each_tap(call.plan, [&](int64_t to, int64_t from, int tap) {
      const T *in = dy + to * stride, *choice = call.saved + to * stride;
      T* out = dx[0] + from * stride;
      for (int64_t c = 0; c < stride; ++c) out[c] += choice[c] == T(tap) ? in[c] : T(0);
    });
  }
};

// Mean over each window: its size with padding (which may stick out past the padded picture's end nowhere, as
// ceil_mode is not lowered), or the number of real pixels.
template <class T>
struct AvgPool {
  static void plan(OpPlan<T>&) {}
  static void prepare(const OpCall<T>&) {}
  static T share(const OpPlan<T>& plan, int64_t row) {
    const Op& op = plan.op;
    if (op.count_padding) return T(1) / T(op.kernel.y * op.kernel.x);
    const int x = int(row % plan.out.shape.width), y = int(row / plan.out.shape.width % plan.out.shape.height);
    const int top = y * op.stride.y - op.padding.y, left = x * op.stride.x - op.padding.x;
    const int height = std::min(top + op.kernel.y, plan.in[0].shape.height) - std::max(top, 0);
    const int width = std::min(left + op.kernel.x, plan.in[0].shape.width) - std::max(left, 0);
    return T(1) / T(height * width);
  }
  static void map(const OpCall<T>& call, const T* const* x, T* y) {
    const int64_t stride = call.plan.out.stride;
    std::fill(y, y + call.plan.rows() * stride, T(0));
    each_tap(call.plan, [&](int64_t to, int64_t from, int) {
      const T weight = share(call.plan, to);
      for (int64_t c = 0; c < stride; ++c) y[to * stride + c] += weight * x[0][from * stride + c];
    });
  }
  static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (!dx[0]) return;
    const int64_t stride = call.plan.out.stride;
    clear_unless_accumulating(call, dx[0]);
    each_tap(call.plan, [&](int64_t to, int64_t from, int) {
      const T weight = share(call.plan, to);
      for (int64_t c = 0; c < stride; ++c) dx[0][from * stride + c] += weight * dy[to * stride + c];
    });
  }
};

// Mean over the whole picture.
template <class T>
struct MeanPool {
  static void plan(OpPlan<T>&) {}
  static void prepare(const OpCall<T>&) {}
  static void map(const OpCall<T>& call, const T* const* x, T* y) {
    const Layout& in = call.plan.in[0];
    const int pixels = in.shape.pixels();
    std::fill(y, y + call.plan.rows() * in.stride, T(0));
    for (int n = 0; n < call.plan.images; ++n)
      for (int i = 0; i < pixels; ++i)
        for (int64_t c = 0; c < in.stride; ++c) y[n * in.stride + c] += x[0][n * in.sample() + i * in.stride + c];
    for (int64_t i = 0; i < call.plan.images * in.stride; ++i) y[i] /= T(pixels);
  }
  static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (!dx[0]) return;
    const Layout& in = call.plan.in[0];
    const int pixels = in.shape.pixels();
    for (int n = 0; n < call.plan.images; ++n)
      for (int i = 0; i < pixels; ++i)
        for (int64_t c = 0; c < in.stride; ++c)
          put(dx[0] + n * in.sample() + i * in.stride + c, dy[n * in.stride + c] / T(pixels), call.accumulate[0]);
  }
};

}  // namespace metaaug::METAAUG_ISA
