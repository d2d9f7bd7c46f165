// theta_{k+1} of one weight from theta_k and its gradient: descent with momentum and weight decay, or Adam. It runs
// where a gradient is found, so that gradients need not be stored.
#pragma once

#include "arguments.h"

namespace metaaug::cuda {

template <class T>
class Update {
 public:
  // `direction` is m_{k+1} or Adam's first moment, `before` is m_k; null where nothing is remembered.
  METAAUG_DEVICE Update(const Arguments<T>& a, int k, const T* from, T* to, T* direction, const T* before, T* second)
      : a(a),
        k(k),
        momentum(k > 0 ? T(a.momentum) : T(0)),
        from(from),
        before(before),
        to(to),
        direction(direction),
        second(second),
        correction1(second ? T(1 / (1 - std::pow(a.beta1, double(k + 1)))) : T(1)),
        correction2(second ? T(1 / (1 - std::pow(a.beta2, double(k + 1)))) : T(1)) {}

  METAAUG_DEVICE METAAUG_NOINLINE void operator()(int p, int i, T gradient) const {
    const int64_t at = a.offsets[p] + i;
    T m = gradient + T(a.weight_decay) * from[at];
    if (second) {  // bias-corrected ratio of moments (Kingma and Ba 2015)
      const T m1 = T(a.beta1) * direction[at] + (T(1) - T(a.beta1)) * m;
      const T m2 = T(a.beta2) * second[at] + (T(1) - T(a.beta2)) * m * m;
      direction[at] = m1;
      second[at] = m2;
      m = m1 * correction1 / (std::sqrt(m2 * correction2) + T(a.eps));
    } else if (direction) {
      if (momentum != T(0)) m += momentum * before[at];
      direction[at] = m;
    }
    to[at] = from[at] - rate(a, p, k, i) * m;
    if (!is_finite(to[at])) finite = false;
  }

  // The place of a rate among those of its parameter, and the rate.
  METAAUG_DEVICE static int64_t rate_at(const Arguments<T>& a, int p, int k, int64_t i) {
    const bool per_element = a.rate_form[p] & kPerElement;
    const int64_t size = per_element ? a.offsets[p + 1] - a.offsets[p] : 1;
    return (a.rate_form[p] & kPerStep ? k * size : 0) + (per_element ? i : 0);
  }
  METAAUG_DEVICE static T rate(const Arguments<T>& a, int p, int k, int64_t i) {
    return a.rate[p][rate_at(a, p, k, i)];
  }

  mutable bool finite = true;  // what this thread has written

 private:
  const Arguments<T>& a;
  const int k;
  const T momentum;
  const T *from, *before;
  T *to, *direction, *second;
  const T correction1, correction2;
};

}  // namespace metaaug::cuda
