// Elementwise functions: y = f(x), dx = f'(x) dy, and their tangents. The formulas are in math.h.
//
// relu and leaky relu may run in place: their derivatives follow from the sign, which y shares with x.
#pragma once

#include "op.h"

namespace metaaug::METAAUG_ISA {
namespace activation {

template <class T>
void plan(OpPlan<T>&) {}

template <class T, template <class> class F>
F<T> function(const Op& op) {
  if constexpr (std::is_same_v<F<T>, LeakyRelu<T>>)
    return {T(op.scalar[0])};
  else if constexpr (std::is_same_v<F<T>, Softplus<T>>)
    return {T(op.scalar[0]), T(op.scalar[1])};
  else
    return {};
}

template <class T, template <class> class F>
void forward(const OpCall<T>& call) {
  const auto f = function<T, F>(call.plan.op);
  const int64_t size = call.plan.rows() * call.plan.out.stride;
  for (int64_t i = 0; i < size; ++i) call.y[i] = f.value(call.x[0][i]);
}

template <class T, template <class> class F>
void backward(const OpCall<T>& call) {
  if (!call.dx[0]) return;
  const auto f = function<T, F>(call.plan.op);
  const int64_t size = call.plan.rows() * call.plan.out.stride;
  const bool accumulate = call.accumulate[0];
  for (int64_t i = 0; i < size; ++i) put(call.dx[0] + i, f.first(call.x[0][i]) * call.dy[i], accumulate);
}

template <class T, template <class> class F>
void tangent(const OpCall<T>& call) {
  const auto f = function<T, F>(call.plan.op);
  const int64_t size = call.plan.rows() * call.plan.out.stride;
  for (int64_t i = 0; i < size; ++i) call.y_t[i] = f.first(call.x[0][i]) * call.x_t[0][i];
}

template <class T, template <class> class F>
void tangent_backward(const OpCall<T>& call) {
  if (!call.dx_t[0]) return;
  const auto f = function<T, F>(call.plan.op);
  const int64_t size = call.plan.rows() * call.plan.out.stride;
  const bool accumulate = call.accumulate[0];
  if constexpr (std::is_same_v<F<T>, Relu<T>> || std::is_same_v<F<T>, LeakyRelu<T>>) {
    for (int64_t i = 0; i < size; ++i) put(call.dx_t[0] + i, f.first(call.x[0][i]) * call.dy_t[i], accumulate);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      const T x = call.x[0][i];
      put(call.dx_t[0] + i, f.second(x) * call.x_t[0][i] * call.dy[i] + f.first(x) * call.dy_t[i], accumulate);
    }
  }
}

}  // namespace activation
}  // namespace metaaug::METAAUG_ISA
