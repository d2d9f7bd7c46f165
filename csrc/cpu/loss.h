// Losses of one task, over rows of padded outputs.
#pragma once

#include "../loss.h"
#include "ops/op.h"

namespace metaaug::METAAUG_ISA {

// The mean loss; arguments as those of LossPlan::value, `saved` [images, classes].
template <class T>
T loss_forward(const LossPlan<T>& plan, const Targets<T>& y, const T* z, T scale, T* saved, T* dz, T* dy) {
  T total = 0;
  for (int n = 0; n < plan.images; ++n, z += plan.stride) {
    total += plan.value(y, n, z, scale, saved + int64_t{n} * plan.classes, dz, dy);
    if (!dz) continue;
    std::fill(dz + plan.classes, dz + plan.stride, T(0));
    dz += plan.stride;
  }
  return total;
}

template <class T>
void loss_tangent(const LossPlan<T>& plan, const Targets<T>& y, const T* z, const T* z_t, const T* saved, T* dz_t,
                  T* dy_t, T* dw_t) {
  for (int n = 0; n < plan.images; ++n, z += plan.stride, z_t += plan.stride, dz_t += plan.stride) {
    plan.tangent(y, n, z, z_t, saved + int64_t{n} * plan.classes, dz_t, dy_t, dw_t);
    std::fill(dz_t + plan.classes, dz_t + plan.stride, T(0));
  }
}

// Share of samples whose largest output is the target's class.
template <class T>
T accuracy(const LossPlan<T>& plan, const Targets<T>& y, const T* z) {
  int right = 0;
  for (int n = 0; n < plan.images; ++n, z += plan.stride) right += plan.right(y, n, z);
  return T(right) / T(plan.images);
}

}  // namespace metaaug::METAAUG_ISA
