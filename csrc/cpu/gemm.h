// The two micro-kernels behind every linear layer and convolution, and the index plans that they follow.
//
// A weight matrix [taps * inputs, outputs] lies in panels of kPanel output columns, each panel a contiguous
// [taps * inputs, width] block, width a multiple of the vector. Activations are [rows, channels] with padded
// channels. `gather` computes C[row] = sum over segments A[row + segment] B[segment]; `outer` the weight gradient.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace metaaug::METAAUG_ISA {

inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = METAAUG_VECTOR_BYTES == 64 ? 4 : 2;

// Length values of A, contiguous from the row's start plus `a`, against `length` rows of B from `b_row`.
struct Segment {
  int64_t a;
  int b_row, length;
};

// Rows of C that share their segments: row i starts at a0 + i * a_stride in A and at c0 + i * c_stride in C.
struct Run {
  int count;
  int64_t a0, a_stride, c0, c_stride;
  int first_segment, segments;
};

struct GatherPlan {
  std::vector<Run> runs;
  std::vector<Segment> segments;
};

// For the weight gradient of one tap: offsets of input and output pixels that it joins, in every image.
struct PixelPair {
  int64_t a, b;
};

struct OuterPlan {
  std::vector<std::vector<PixelPair>> taps;
  int images = 0;
  int64_t a_image = 0, b_image = 0;
};

// One product to be accumulated; a tangent accumulates two.
template <class T>
struct Product {
  const T* a;
  const T* b;
};

template <class T>
struct Panels {
  static constexpr int kColumns = kTileVectors * Simd<T>::kWidth;
  int64_t rows, columns;  // columns padded to the vector

  int count() const { return int((columns + kColumns - 1) / kColumns); }
  int width(int panel) const { return int(std::min<int64_t>(kColumns, columns - int64_t{panel} * kColumns)); }
  int64_t start(int panel) const { return int64_t{panel} * kColumns * rows; }
  int64_t at(int64_t row, int64_t column) const {
    const int panel = int(column / kColumns);
    return start(panel) + row * width(panel) + column % kColumns;
  }
  int64_t size() const { return rows * columns; }
};

template <class T, int kRows, int kVectors>
__attribute__((noinline)) void gather_tile(const Segment* segments, int count, const Product<T>* products, int terms,
                                           int64_t a0, int64_t a_stride, int64_t panel, const T* bias, T* c,
                                           int64_t c_stride, bool accumulate) {
  using S = Simd<T>;
  typename S::Vector sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) sum[i][j] = bias ? S::load(bias + j * S::kWidth) : S::fill(0);
  for (int term = 0; term < terms; ++term) {
    for (int s = 0; s < count; ++s) {
      const T* a = products[term].a + a0 + segments[s].a;
      const T* b = products[term].b + panel + int64_t{segments[s].b_row} * kVectors * S::kWidth;
      for (int k = 0; k < segments[s].length; ++k, b += kVectors * S::kWidth) {
        typename S::Vector column[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) column[j] = S::load(b + j * S::kWidth);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const typename S::Vector value = S::fill(a[i * a_stride + k]);
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) sum[i][j] += value * column[j];
        }
      }
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) {
      T* out = c + i * c_stride + j * S::kWidth;
      S::store(out, accumulate ? S::load(out) + sum[i][j] : sum[i][j]);
    }
}

// C rows are consecutive input channels of one tap; the sum runs over pixels and images.
template <class T, int kRows, int kVectors>
__attribute__((noinline)) void outer_tile(const OuterPlan& plan, const std::vector<PixelPair>& pixels,
                                          const Product<T>* products, int terms, int64_t a_column, int64_t b_column,
                                          T* c) {
  using S = Simd<T>;
  typename S::Vector sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) sum[i][j] = S::load(c + (i * kVectors + j) * S::kWidth);
  for (int term = 0; term < terms; ++term) {
    for (int n = 0; n < plan.images; ++n) {
      const T* image_a = products[term].a + a_column + n * plan.a_image;
      const T* image_b = products[term].b + b_column + n * plan.b_image;
      for (const PixelPair& pixel : pixels) {
        const T *a = image_a + pixel.a, *b = image_b + pixel.b;
        typename S::Vector column[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) column[j] = S::load(b + j * S::kWidth);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const typename S::Vector value = S::fill(a[i]);
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) sum[i][j] += value * column[j];
        }
      }
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) S::store(c + (i * kVectors + j) * S::kWidth, sum[i][j]);
}

// Calls body(integral_constant<rows>, integral_constant<vectors>) for the run-time pair.
template <int kVectors, class Body>
inline void with_rows(int rows, const Body& body) {
  constexpr std::integral_constant<int, kVectors> vectors;
  static_assert(kTileRows == 6);
  switch (rows) {
    case 1:
      return body(std::integral_constant<int, 1>(), vectors);
    case 2:
      return body(std::integral_constant<int, 2>(), vectors);
    case 3:
      return body(std::integral_constant<int, 3>(), vectors);
    case 4:
      return body(std::integral_constant<int, 4>(), vectors);
    case 5:
      return body(std::integral_constant<int, 5>(), vectors);
    default:
      return body(std::integral_constant<int, 6>(), vectors);
  }
}

template <class Body>
inline void with_tile(int rows, int vectors, const Body& body) {
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return with_rows<4>(rows, body);
    if (vectors == 3) return with_rows<3>(rows, body);
  }
  if (vectors == 2) return with_rows<2>(rows, body);
  return with_rows<1>(rows, body);
}

// Cuts `count` rows into the fewest tiles, as even as can be: body(first, rows).
template <class Body>
inline void each_tile(int count, const Body& body) {
  const int tiles = (count + kTileRows - 1) / kTileRows;
  for (int i = 0, first = 0; i < tiles; ++i) {
    const int rows = (count - first) / (tiles - i);
    body(first, rows);
    first += rows;
  }
}

// C (+)= bias + sum of products over the plan's runs; `matrix` is the shape of every product's B.
template <class T>
void gather(const GatherPlan& plan, const Panels<T>& matrix, const Product<T>* products, int terms, const T* bias, T* c,
            bool accumulate) {
  for (int p = 0; p < matrix.count(); ++p) {
    const int64_t column = int64_t{p} * Panels<T>::kColumns;
    for (const Run& run : plan.runs) {
      each_tile(run.count, [&](int first, int rows) {
        with_tile(rows, matrix.width(p) / Simd<T>::kWidth, [&](auto rows_, auto vectors_) {
          gather_tile<T, decltype(rows_)::value, decltype(vectors_)::value>(
              plan.segments.data() + run.first_segment, run.segments, products, terms, run.a0 + first * run.a_stride,
              run.a_stride, matrix.start(p), bias ? bias + column : nullptr, c + run.c0 + first * run.c_stride + column,
              run.c_stride, accumulate);
        });
      });
    }
  }
}

// C += sum of A^T B over the plan's pixels; `matrix` is C's shape, [taps * inputs, outputs].
template <class T>
void outer(const OuterPlan& plan, const Panels<T>& matrix, const Product<T>* products, int terms, T* c) {
  const int inputs = int(matrix.rows / int64_t(plan.taps.size()));
  for (int p = 0; p < matrix.count(); ++p) {
    const int width = matrix.width(p);
    for (size_t tap = 0; tap < plan.taps.size(); ++tap) {
      if (plan.taps[tap].empty()) continue;
      each_tile(inputs, [&](int first, int rows) {
        T* out = c + matrix.start(p) + (int64_t(tap) * inputs + first) * width;
        with_tile(rows, width / Simd<T>::kWidth, [&](auto rows_, auto vectors_) {
          outer_tile<T, decltype(rows_)::value, decltype(vectors_)::value>(plan, plan.taps[tap], products, terms, first,
                                                                           int64_t{p} * Panels<T>::kColumns, out);
        });
      });
    }
  }
}

// Per tap, the transpose of [inputs, outputs]: B of the input gradient, [taps * outputs, inputs].
template <class T>
void transpose(const Panels<T>& from, const T* source, const Panels<T>& to, T* target, int taps, int inputs,
               int outputs) {
  for (int tap = 0; tap < taps; ++tap)
    for (int p = 0; p < to.count(); ++p) {
      const int width = to.width(p), first = p * Panels<T>::kColumns;
      for (int q = 0; q < from.count(); ++q) {
        const int from_width = from.width(q), last = std::min(outputs, (q + 1) * Panels<T>::kColumns);
        for (int o = q * Panels<T>::kColumns; o < last; ++o) {
          const T* in = source + from.start(q) + (int64_t{tap} * inputs + first) * from_width + o % Panels<T>::kColumns;
          T* out = target + to.start(p) + (int64_t{tap} * outputs + o) * width;
          const int valid = std::min(width, inputs - first);
          for (int i = 0; i < valid; ++i) out[i] = in[int64_t{i} * from_width];
          for (int i = valid; i < width; ++i) out[i] = 0;
        }
      }
    }
}

}  // namespace metaaug::METAAUG_ISA
