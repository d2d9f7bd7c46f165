// What ops of two inputs share: the second has the shape of the first, or one pixel for all of a sample's.
#pragma once

#include "op.h"

namespace metaaug::METAAUG_ISA {

// Whether it has one pixel for all.
template <class T>
inline bool shared_pixel(const OpPlan<T>& plan) {
  return plan.in[1].shape.pixels() != plan.out.shape.pixels();
}

// Calls body(element of the first input and of the output, element of the second input).
template <class T, class Body>
inline void each_of_two(const OpPlan<T>& plan, const Body& body) {
  const int64_t sample = plan.out.sample(), stride = plan.out.stride, size = plan.images * sample;
  if (!shared_pixel(plan)) {
    for (int64_t i = 0; i < size; ++i) body(i, i);
    return;
  }
  for (int64_t first = 0, one = 0; first < size; first += sample, one += stride)
    for (int64_t pixel = first; pixel < first + sample; pixel += stride)
      for (int64_t c = 0; c < stride; ++c) body(pixel + c, one + c);
}

// Writes the adjoint of the second input, of value(element of the output), or adds to it.
template <class T, class Value>
inline void put_second(const OpCall<T>& call, T* dx, const Value& value) {
  constexpr int kWidth = Simd<T>::kWidth;
  const OpPlan<T>& plan = call.plan;
  const int64_t sample = plan.out.sample(), stride = plan.out.stride, size = plan.images * sample;
  const bool accumulate = call.accumulate[1];
  if (!shared_pixel(plan)) {
    for (int64_t i = 0; i < size; ++i) put(dx + i, value(i), accumulate);
    return;
  }
  for (int64_t first = 0, one = 0; first < size; first += sample, one += stride)
    for (int64_t c = 0; c < stride; c += kWidth) {
      T sum[kWidth] = {};
      for (int64_t pixel = first + c; pixel < first + sample; pixel += stride)
        for (int i = 0; i < kWidth; ++i) sum[i] += value(pixel + i);
      for (int i = 0; i < kWidth; ++i) put(dx + one + c + i, sum[i], accumulate);
    }
}

}  // namespace metaaug::METAAUG_ISA
