// The product of two values: y = a b, da = dy b, db = dy a, and their tangents.
#pragma once

#include "two_inputs.h"

namespace metaaug::METAAUG_ISA::multiply {

template <class T>
void plan(OpPlan<T>&) {}

template <class T>
void forward(const OpCall<T>& call) {
  const T *a = call.x[0], *b = call.x[1];
  each_of_two(call.plan, [&](int64_t i, int64_t j) { call.y[i] = a[i] * b[j]; });
}

template <class T>
void backward(const OpCall<T>& call) {
  const T *a = call.x[0], *b = call.x[1], *dy = call.dy;
  T* da = call.dx[0];
  if (da) each_of_two(call.plan, [&](int64_t i, int64_t j) { put(da + i, dy[i] * b[j], call.accumulate[0]); });
  if (call.dx[1]) put_second(call, call.dx[1], [&](int64_t i) { return dy[i] * a[i]; });
}

template <class T>
void tangent(const OpCall<T>& call) {
  const T *a = call.x[0], *b = call.x[1], *a_t = call.x_t[0], *b_t = call.x_t[1];
  each_of_two(call.plan,
              [&](int64_t i, int64_t j) { call.y_t[i] = (a_t ? a_t[i] * b[j] : T(0)) + (b_t ? a[i] * b_t[j] : T(0)); });
}

template <class T>
void tangent_backward(const OpCall<T>& call) {
  const T *a = call.x[0], *b = call.x[1], *a_t = call.x_t[0], *b_t = call.x_t[1], *dy = call.dy, *dy_t = call.dy_t;
  T* da_t = call.dx_t[0];
  if (da_t) {
    each_of_two(call.plan, [&](int64_t i, int64_t j) {
      put(da_t + i, dy_t[i] * b[j] + (b_t ? dy[i] * b_t[j] : T(0)), call.accumulate[0]);
    });
  }
  if (call.dx_t[1]) {
    put_second(call, call.dx_t[1], [&](int64_t i) { return dy_t[i] * a[i] + (a_t ? dy[i] * a_t[i] : T(0)); });
  }
}

}  // namespace metaaug::METAAUG_ISA::multiply
