// What every op is given: its plan (sizes and index lists, made once for a batch size) and pointers for one call.
#pragma once

#include "../../graph.h"
#include "../../math.h"
#include "../winograd.h"

namespace metaaug::METAAUG_ISA {

// A value of `images` samples: [images * pixels, stride], channels padded to stride.
struct Layout {
  Shape shape;
  int64_t stride = 0;
  int64_t sample() const { return shape.pixels() * stride; }
};

template <class T>
struct OpPlan {
  Op op;
  int images = 0;
  Layout in[2], out;
  bool moves = true;                                  // whether the first input depends on what adapts
  bool wants_dx = true;                               // whether any pass asks for an adjoint of it
  int64_t saved = 0, saved_tangent = 0, scratch = 0;  // elements, sized by the op's `plan`

  // conv2d only
  Panels<T> matrix, transposed;
  GatherPlan forward, input_gradient;
  OuterPlan weight_gradient;
  bool keeps_transposed = false;
  bool narrow = false;    // the weights lie as narrow.h says
  bool winograd = false;  // instead of the plans above
  Winograd<T> forward_tiles, input_gradient_tiles;

  int64_t rows() const { return int64_t{images} * out.shape.pixels(); }
  int64_t in_rows() const { return int64_t{images} * in[0].shape.pixels(); }
};

// Primes of the design are `_t` here: x_t is the tangent of x, dx the adjoint, dx_t the tangent of the adjoint.
// Null means: zero (a tangent) or not wanted (an output). Parameter adjoints are added to; dx is written, or added
// to where `accumulate` says so.
template <class T>
struct OpCall {
  explicit OpCall(const OpPlan<T>& plan) : plan(plan) {}

  const OpPlan<T>& plan;
  const T* x[2] = {};
  T* y = nullptr;
  const T* p[2] = {};
  const T* x_t[2] = {};
  T* y_t = nullptr;
  const T* p_t[2] = {};
  const T* dy = nullptr;
  T* dx[2] = {};
  T* dp[2] = {};
  const T* dy_t = nullptr;
  T* dx_t[2] = {};
  T* dp_t[2] = {};
  bool accumulate[2] = {};
  T* saved = nullptr;          // written by forward, kept for the step
  T* saved_tangent = nullptr;  // written by tangent, read by tangent_backward
  T* scratch = nullptr;
  uint32_t key = 0;  // dropout
  // A call that takes the adjoint of x picture by picture, from room for one: see Network::streamed.
  const OpCall* reader = nullptr;

  bool moves() const { return x_t[0] || x_t[1] || p_t[0] || p_t[1]; }
};

// The op table: y = f(x, p); dx, dp from dy; the tangent of each.
template <class T>
struct OpFunctions {
  void (*plan)(OpPlan<T>&);
  void (*forward)(const OpCall<T>&);
  void (*backward)(const OpCall<T>&);
  void (*tangent)(const OpCall<T>&);
  void (*tangent_backward)(const OpCall<T>&);
};

// A batch norm in halves, for samples that come in pieces: between the halves lie sums over all of them.
template <class T>
struct NormFunctions {
  void (*moments)(const OpCall<T>&, T* mean, T* square);
  void (*settle)(const OpPlan<T>&, int64_t rows, T* saved);
  void (*normalise)(const OpCall<T>&);
  const T* (*adjoint_sums)(const OpCall<T>&);
  void (*spread)(const OpCall<T>&, const T* sums, T share);
};

template <class T>
void put(T* target, T value, bool accumulate) {
  *target = accumulate ? *target + value : value;
}

// Calls body(first_channel, integral_constant<vectors>) over blocks of a cache line (or what is left of one).
template <class T, class Body>
inline void each_block(int64_t stride, const Body& body) {
  constexpr int kLine = METAAUG_VECTOR_BYTES >= 64 ? 1 : 64 / METAAUG_VECTOR_BYTES, kWidth = Simd<T>::kWidth;
  int64_t channel = 0;
  for (; channel + kLine * kWidth <= stride; channel += kLine * kWidth)
    body(channel, std::integral_constant<int, kLine>());
  for (; channel < stride; channel += kWidth) body(channel, std::integral_constant<int, 1>());
}

// Sums kSums vectors over rows; body(row, sums) adds one row. In chunks, so that rounding does not grow with rows.
template <class T, int kSums, int kVectors, class Body>
inline void sum_rows(int64_t rows, typename Simd<T>::Vector (&total)[kSums][kVectors], const Body& body) {
  constexpr int64_t kChunk = 128;
  for (int s = 0; s < kSums; ++s)
    for (int j = 0; j < kVectors; ++j) total[s][j] = typename Simd<T>::Vector{};
  for (int64_t first = 0; first < rows; first += kChunk) {
    typename Simd<T>::Vector part[kSums][kVectors] = {};
    for (int64_t row = first; row < std::min(rows, first + kChunk); ++row) body(row, part);
    for (int s = 0; s < kSums; ++s)
      for (int j = 0; j < kVectors; ++j) total[s][j] += part[s][j];
  }
}

// out[channel] += the sum of dy over rows: the adjoint of a bias.
template <class T>
void add_column_sums(const T* dy, int64_t rows, int64_t stride, T* out) {
  using S = Simd<T>;
  each_block<T>(stride, [&](int64_t channel, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    typename S::Vector sum[1][kVectors];
    sum_rows<T>(rows, sum, [&](int64_t row, auto& part) {
      for (int j = 0; j < kVectors; ++j) part[0][j] += S::load(dy + row * stride + channel + j * S::kWidth);
    });
    for (int j = 0; j < kVectors; ++j) {
      T* target = out + channel + j * S::kWidth;
      S::store(target, S::load(target) + sum[0][j]);
    }
  });
}

}  // namespace metaaug::METAAUG_ISA
