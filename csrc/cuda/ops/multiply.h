// The product of two values: y = a b, da = dy b, db = dy a, and their tangents.
#pragma once

#include "op.h"

namespace metaaug::cuda {

template <class T>
struct Multiply {
  METAAUG_DEVICE static void forward(const OpCall<T>& call) {
    each(call.size(), [&](int i) { call.y[i] = call.x[0][i] * call.x[1][call.second(i)]; });
  }

  // Both inputs may be the same value: then one adds to what the other wrote.
  METAAUG_DEVICE static void backward(const OpCall<T>& call) {
    const T *a = call.x[0], *b = call.x[1], *dy = call.dy;
    if (call.dx[0]) each(call.size(), [&](int i) { call.put_adjoint(call.dx, 0, i, dy[i] * b[call.second(i)]); });
    if (call.dx[1]) call.put_second(call.dx, [&](int i) { return dy[i] * a[i]; });
  }

  METAAUG_DEVICE static void tangent(const OpCall<T>& call) {
    const T *a = call.x[0], *b = call.x[1], *a_t = call.x_t[0], *b_t = call.x_t[1];
    each(call.size(), [&](int i) {
      const int j = call.second(i);
      call.y_t[i] = (a_t ? a_t[i] * b[j] : T(0)) + (b_t ? a[i] * b_t[j] : T(0));
    });
  }

  METAAUG_DEVICE static void tangent_backward(const OpCall<T>& call) {
    const T *a = call.x[0], *b = call.x[1], *a_t = call.x_t[0], *b_t = call.x_t[1], *dy = call.dy, *dy_t = call.dy_t;
    if (call.dx_t[0]) {
      each(call.size(), [&](int i) {
        const int j = call.second(i);
        call.put_adjoint(call.dx_t, 0, i, dy_t[i] * b[j] + (b_t ? dy[i] * b_t[j] : T(0)));
      });
    }
    if (call.dx_t[1]) call.put_second(call.dx_t, [&](int i) { return dy_t[i] * a[i] + (a_t ? dy[i] * a_t[i] : T(0)); });
  }
};

}  // namespace metaaug::cuda
