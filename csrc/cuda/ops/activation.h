// Elementwise functions: y = f(x), dx = f'(x) dy, and their tangents. The formulas are in math.h.
#pragma once

#include "op.h"

namespace metaaug::cuda {

template <class T, class F>
struct Activation {
  METAAUG_DEVICE static void forward(const OpCall<T>& call, const F& f) {
    each(call.size(), [&](int i) { call.y[i] = f.value(call.x[0][i]); });
  }

  METAAUG_DEVICE static void backward(const OpCall<T>& call, const F& f) {
    if (!call.dx[0]) return;
    each(call.size(), [&](int i) { call.put_adjoint(call.dx, 0, i, f.first(call.x[0][i]) * call.dy[i]); });
  }

  METAAUG_DEVICE static void tangent(const OpCall<T>& call, const F& f) {
    each(call.size(), [&](int i) { call.y_t[i] = f.first(call.x[0][i]) * call.x_t[0][i]; });
  }

  METAAUG_DEVICE static void tangent_backward(const OpCall<T>& call, const F& f) {
    if (!call.dx_t[0]) return;
    each(call.size(), [&](int i) {
      const T x = call.x[0][i];
      const T value = f.second(x) * call.x_t[0][i] * call.dy[i] + f.first(x) * call.dy_t[i];
      call.put_adjoint(call.dx_t, 0, i, value);
    });
  }
};

}  // namespace metaaug::cuda
