// The products of a linear layer or 1x1 convolution of so few outputs that a vector of them would be mostly padding:
// the weights lie as [outputs, inputs], and vectors run along the inputs.
#pragma once

#include "op.h"

namespace metaaug::METAAUG_ISA {
namespace narrow {

// The pixels that are read, of every image: offsets in the input and in the output.
template <class T, class Body>
void each_pair(const OpPlan<T>& plan, const Body& body) {
  const OuterPlan& pixels = plan.weight_gradient;
  for (int n = 0; n < pixels.images; ++n)
    for (const PixelPair& pair : pixels.taps[0]) body(n * pixels.a_image + pair.a, n * pixels.b_image + pair.b);
}

// Cuts `inputs` into blocks of vectors and single values: body(first, integral_constant<vectors>), 0 for one value.
template <class T, class Body>
void each_part(int inputs, const Body& body) {
  constexpr int kWidth = Simd<T>::kWidth, kMany = 5;
  int i = 0;
  for (; i + kMany * kWidth <= inputs; i += kMany * kWidth) body(i, std::integral_constant<int, kMany>());
  for (; i + kWidth <= inputs; i += kWidth) body(i, std::integral_constant<int, 1>());
  for (; i < inputs; ++i) body(i, std::integral_constant<int, 0>());
}

// C = bias + products, of inputs and weights. Dot products of a vector of pixels are summed up together; where fewer
// are left, the last stands in for the missing ones.
template <class T>
void products(const OpPlan<T>& plan, const Product<T>* products, int terms, const T* bias, T* c) {
  using S = Simd<T>;
  constexpr int kWidth = S::kWidth;
  const int inputs = plan.in[0].shape.channels, outputs = plan.out.shape.channels, whole = inputs / kWidth * kWidth;
  const int64_t row = pad<T>(inputs);
  int64_t from[kWidth], to[kWidth];
  int waiting = 0;
  const auto add = [&] {
    for (int k = waiting; k < kWidth; ++k) from[k] = from[waiting - 1];
    for (int o = 0; o < outputs; ++o) {
      typename S::Vector sum[kWidth] = {};
      T rest[kWidth] = {};
      for (int term = 0; term < terms; ++term) {
        const T *a = products[term].a, *b = products[term].b + o * row;
        for (int i = 0; i < whole; i += kWidth) {
          const typename S::Vector weights = S::load(b + i);
#pragma GCC unroll 16
          for (int k = 0; k < kWidth; ++k) sum[k] += S::load(a + from[k] + i) * weights;
        }
        for (int i = whole; i < inputs; ++i)
          for (int k = 0; k < waiting; ++k) rest[k] += a[from[k] + i] * b[i];
      }
      transpose_block<T>(sum);
#pragma GCC unroll 16
      for (int k = 1; k < kWidth; ++k) sum[0] += sum[k];
      S::store(rest, sum[0] + S::load(rest));
      for (int k = 0; k < waiting; ++k) c[to[k] + o] += rest[k];
    }
    waiting = 0;
  };
  // Of pixels that read padding alone the bias is left; a row is one vector.
  const typename S::Vector empty = bias ? S::load(bias) : S::fill(0);
  for (int64_t i = 0; i < plan.rows(); ++i) S::store(c + i * S::kWidth, empty);
  each_pair(plan, [&](int64_t a, int64_t out) {
    from[waiting] = a, to[waiting] = out;
    if (++waiting == kWidth) add();
  });
  if (waiting) add();
}

// dx (+)= products of output adjoints and weights.
template <class T>
void products_back(const OpCall<T>& call, const Product<T>* products, int terms, T* dx) {
  using S = Simd<T>;
  const OpPlan<T>& plan = call.plan;
  const int inputs = plan.in[0].shape.channels, outputs = plan.out.shape.channels;
  const int64_t row = pad<T>(inputs);
  if (!call.accumulate[0]) std::fill(dx, dx + plan.in_rows() * plan.in[0].stride, T(0));
  for (int term = 0; term < terms; ++term)
    for (int o = 0; o < outputs; ++o) {
      const T *a = products[term].a + o, *w = products[term].b + o * row;
      each_part<T>(inputs, [&](int i, auto vectors) {
        typename S::Vector column[vectors.value + 1];
#pragma GCC unroll 5
        for (int j = 0; j < vectors.value; ++j) column[j] = S::load(w + i + j * S::kWidth);
        each_pair(plan, [&](int64_t in, int64_t out) {
          T* to = dx + in + i;
          if constexpr (vectors.value == 0) *to += a[out] * w[i];
#pragma GCC unroll 5
          for (int j = 0; j < vectors.value; ++j, to += S::kWidth) S::store(to, S::load(to) + a[out] * column[j]);
        });
      });
    }
}

// dw += products of inputs and output adjoints.
template <class T>
void weight_gradient(const OpPlan<T>& plan, const Product<T>* products, int terms, T* dw) {
  using S = Simd<T>;
  const int inputs = plan.in[0].shape.channels, outputs = plan.out.shape.channels;
  const int64_t row = pad<T>(inputs);
  for (int o = 0; o < outputs; ++o)
    each_part<T>(inputs, [&](int i, auto vectors) {
      typename S::Vector sum[vectors.value + 1] = {};
      T single = 0;
      for (int term = 0; term < terms; ++term) {
        const T *x = products[term].a + i, *dy = products[term].b + o;
        each_pair(plan, [&](int64_t in, int64_t out) {
          if constexpr (vectors.value == 0) single += x[in] * dy[out];
#pragma GCC unroll 5
          for (int j = 0; j < vectors.value; ++j) sum[j] += dy[out] * S::load(x + in + j * S::kWidth);
        });
      }
      T* to = dw + o * row + i;
      if constexpr (vectors.value == 0) *to += single;
      for (int j = 0; j < vectors.value; ++j, to += S::kWidth) S::store(to, S::load(to) + sum[j]);
    });
}

}  // namespace narrow
}  // namespace metaaug::METAAUG_ISA
