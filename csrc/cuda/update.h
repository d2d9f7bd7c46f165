// theta_{k+1} from theta_k and its gradient: descent with momentum and weight decay, or Adam. It runs where a gradient
// is found, so that gradients need not be stored.
#pragma once

#include "arguments.h"

namespace metaaug::cuda {

// A parameter's rates at one step.
template <class T>
struct Rates {
  const T* values;  // null where the parameter does not move
  bool per_element;

  METAAUG_DEVICE Rates(const Arguments<T>& a, int p, int k)
      : values(a.rate[p]), per_element(a.rate_form[p] & kPerElement) {
    if (values && a.rate_form[p] & kPerStep) values += k * int64_t{per_element ? a.size(p) : 1};
  }
  METAAUG_DEVICE T operator[](int i) const { return values[per_element ? i : 0]; }
};

// Where an inner step reads and writes.
template <class T>
struct Update {
  const Arguments<T>& a;
  int k;
  const T* from;
  T* to;
  T* direction;                // m_{k+1}, or Adam's first moment; null where nothing is remembered
  const T* before;             // m_k
  T* second;                   // Adam's second moment
  T correction1, correction2;  // of its two moments' bias
  mutable bool finite = true;  // what this thread has written
};

// The step of one parameter.
template <class T>
class ParameterStep {
 public:
  ParameterStep() = default;
  METAAUG_DEVICE ParameterStep(const Update<T>& update, int p)
      : update(&update),
        from(update.from + update.a.offset[p]),
        to(update.to + update.a.offset[p]),
        offset(update.a.offset[p]),
        decay(T(update.a.weight_decay)) {
    const Rates<T> rates(update.a, p, update.k);
    if (rates.per_element)
      each_rate = rates.values;
    else
      rate = rates[0];
  }

  METAAUG_DEVICE explicit operator bool() const { return update != nullptr; }

  METAAUG_DEVICE void operator()(int i, T gradient) const {
    T m = gradient + decay * from[i];
    if (update->direction) m = remembered(i, m);
    const T value = from[i] - (each_rate ? each_rate[i] : rate) * m;
    to[i] = value;
    if (!is_finite(value)) update->finite = false;
  }

 private:
  METAAUG_DEVICE METAAUG_NOINLINE T remembered(int i, T m) const {
    const Arguments<T>& a = update->a;
    T& direction = update->direction[offset + i];
    if (!update->second) {
      if (update->k > 0) m += T(a.momentum) * update->before[offset + i];
      return direction = m;
    }
    T& second = update->second[offset + i];  // the bias-corrected ratio of moments (Kingma and Ba 2015)
    direction = T(a.beta1) * direction + (T(1) - T(a.beta1)) * m;
    second = T(a.beta2) * second + (T(1) - T(a.beta2)) * m * m;
    return direction / update->correction1 / (std::sqrt(second / update->correction2) + T(a.eps));
  }

  const Update<T>* update = nullptr;
  const T* from = nullptr;
  T* to = nullptr;
  int offset = 0;
  T decay = 0, rate = 0;
  const T* each_rate = nullptr;
};

}  // namespace metaaug::cuda
