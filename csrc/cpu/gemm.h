// The two micro-kernels behind every linear layer and convolution, and the index plans that they follow.
//
// A weight matrix [taps * inputs, outputs] lies in panels of kPanel output columns, each panel a contiguous
// [taps * inputs, width] block, width a multiple of the vector. Activations are [rows, channels] with padded
// channels. `gather` computes C[row] = sum over segments A[row + segment] B[segment]; `outer` the weight gradient.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "simd.h"

namespace metaaug::METAAUG_ISA {

// A tile of C is held in registers: as many rows as there is room for beside a row of B and a value of A.
inline constexpr int kTileVectors = METAAUG_VECTOR_BYTES == 64 ? 4 : 2;
inline constexpr int kTileRegisters = METAAUG_VECTOR_BYTES == 64 ? 24 : 12;
inline constexpr int kMaxRows = 12;
constexpr int tile_rows(int vectors) { return std::min(kTileRegisters / vectors, kMaxRows); }

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

// The pixels that a sum runs over, the same ones in each image.
struct Pixels {
  const PixelPair* pairs;
  int count, images;
  int64_t a_image, b_image;
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
void gather_tile(const Segment* segments, int count, const Product<T>* products, int terms, int64_t a0,
                 int64_t a_stride, int64_t panel, const T* bias, T* c, int64_t c_stride, bool accumulate) {
  using S = Simd<T>;
  typename S::Vector sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[i][j] = bias ? S::load(bias + j * S::kWidth) : S::fill(0);
  for (int term = 0; term < terms; ++term) {
    for (int s = 0; s < count; ++s) {
      const T* a = products[term].a + a0 + segments[s].a;
      const T* b = products[term].b + panel + int64_t{segments[s].b_row} * kVectors * S::kWidth;
      for (int k = 0; k < segments[s].length; ++k, b += kVectors * S::kWidth) {
        typename S::Vector column[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) column[j] = S::load(b + j * S::kWidth);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const typename S::Vector value = S::fill(a[i * a_stride + k]);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) sum[i][j] += value * column[j];
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      T* out = c + i * c_stride + j * S::kWidth;
      S::store(out, accumulate ? S::load(out) + sum[i][j] : sum[i][j]);
    }
}

// C rows are consecutive input channels of one tap; the sum runs over pixels and images.
template <class T, int kRows, int kVectors>
void outer_tile(const Pixels& pixels, const Product<T>* products, int terms, int64_t a_column, int64_t b_column, T* c) {
  using S = Simd<T>;
  typename S::Vector sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[i][j] = S::load(c + (i * kVectors + j) * S::kWidth);
  for (int term = 0; term < terms; ++term) {
    for (int n = 0; n < pixels.images; ++n) {
      const T* image_a = products[term].a + a_column + n * pixels.a_image;
      const T* image_b = products[term].b + b_column + n * pixels.b_image;
      for (int pixel = 0; pixel < pixels.count; ++pixel) {
        const T *a = image_a + pixels.pairs[pixel].a, *b = image_b + pixels.pairs[pixel].b;
        typename S::Vector column[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) column[j] = S::load(b + j * S::kWidth);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const typename S::Vector value = S::fill(a[i]);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) sum[i][j] += value * column[j];
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) S::store(c + (i * kVectors + j) * S::kWidth, sum[i][j]);
}

// The micro-kernels by rows and vectors of a tile.
template <class T>
struct Tiles {
  using Gather = decltype(&gather_tile<T, 1, 1>);
  using Outer = decltype(&outer_tile<T, 1, 1>);
  Gather gather[kTileVectors][kMaxRows] = {};
  Outer outer[kTileVectors][kMaxRows] = {};

  static const Tiles& table() {
    static constexpr Tiles tiles;
    return tiles;
  }

 private:
  constexpr Tiles() { fill<1>(); }

  template <int kVectors>
  constexpr void fill() {
    fill_rows<kVectors>(std::make_integer_sequence<int, tile_rows(kVectors)>());
    if constexpr (kVectors < kTileVectors) fill<kVectors + 1>();
  }

  template <int kVectors, int... kRows>
  constexpr void fill_rows(std::integer_sequence<int, kRows...>) {
    ((gather[kVectors - 1][kRows] = &gather_tile<T, kRows + 1, kVectors>), ...);
    ((outer[kVectors - 1][kRows] = &outer_tile<T, kRows + 1, kVectors>), ...);
  }
};

// Cuts `count` rows into the fewest tiles of at most `most`, as even as can be: body(first, rows).
template <class Body>
inline void each_tile(int count, int most, const Body& body) {
  if (count <= most) return body(0, count);
  if (count <= 2 * most) {  // without a division, which in small nets costs as much as ten products
    body(0, (count + 1) / 2);
    return body((count + 1) / 2, count / 2);
  }
  const int tiles = (count + most - 1) / most, least = count / tiles, larger = count % tiles;
  for (int i = 0, first = 0; i < tiles; ++i) {
    const int rows = least + (i < larger);
    body(first, rows);
    first += rows;
  }
}

// C (+)= bias + sum of products over the plan's runs; `matrix` is the shape of every product's B. One panel after the
// other, so that it stays in the first cache; where all of B does, one run after the other.
template <class T>
void gather(const GatherPlan& plan, const Panels<T>& matrix, const Product<T>* products, int terms, const T* bias, T* c,
            bool accumulate) {
  constexpr int64_t kBytes = 12 * 1024;
  const auto work = [&](int p, const Run& run) {
    const int64_t column = int64_t{p} * Panels<T>::kColumns;
    const int vectors = matrix.width(p) / Simd<T>::kWidth;
    const auto& kernels = Tiles<T>::table().gather[vectors - 1];
    each_tile(run.count, tile_rows(vectors), [&](int first, int rows) {
      kernels[rows - 1](plan.segments.data() + run.first_segment, run.segments, products, terms,
                        run.a0 + first * run.a_stride, run.a_stride, matrix.start(p), bias ? bias + column : nullptr,
                        c + run.c0 + first * run.c_stride + column, run.c_stride, accumulate);
    });
  };
  if (terms * matrix.size() * int64_t(sizeof(T)) <= kBytes) {
    for (const Run& run : plan.runs)
      for (int p = 0; p < matrix.count(); ++p) work(p, run);
  } else {
    for (int p = 0; p < matrix.count(); ++p)
      for (const Run& run : plan.runs) work(p, run);
  }
}

template <class T>
void outer_images(const OuterPlan& plan, int images, const Panels<T>& matrix, const Product<T>* products, int terms,
                  T* c) {
  const int inputs = int(matrix.rows / int64_t(plan.taps.size()));
  for (int p = 0; p < matrix.count(); ++p) {
    const int width = matrix.width(p), vectors = width / Simd<T>::kWidth;
    const auto& kernels = Tiles<T>::table().outer[vectors - 1];
    for (size_t tap = 0; tap < plan.taps.size(); ++tap) {
      if (plan.taps[tap].empty()) continue;
      const Pixels pixels{plan.taps[tap].data(), int(plan.taps[tap].size()), images, plan.a_image, plan.b_image};
      each_tile(inputs, tile_rows(vectors), [&](int first, int rows) {
        T* out = c + matrix.start(p) + (int64_t(tap) * inputs + first) * width;
        kernels[rows - 1](pixels, products, terms, first, int64_t{p} * Panels<T>::kColumns, out);
      });
    }
  }
}

// C += sum of A^T B over the plan's pixels; `matrix` is C's shape, [taps * inputs, outputs]. As many images at a time
// as stay in the second cache.
template <class T>
void outer(const OuterPlan& plan, const Panels<T>& matrix, const Product<T>* products, int terms, T* c) {
  constexpr int64_t kBytes = 256 * 1024;
  const int64_t bytes = terms * (plan.a_image + plan.b_image) * int64_t(sizeof(T));
  const int at_once = bytes == 0 ? plan.images : int(std::clamp<int64_t>(kBytes / bytes, 1, plan.images));
  for (int image = 0; image < plan.images; image += at_once) {
    const int images = std::min(at_once, plan.images - image);
    Product<T> part[2];
    for (int term = 0; term < terms; ++term)
      part[term] = {products[term].a + image * plan.a_image, products[term].b + image * plan.b_image};
    outer_images(plan, images, matrix, part, terms, c);
  }
}

// Of a square of vectors, `rows` by `columns` of which there are: rows `in_row` apart to columns `out_row` apart.
template <class T>
inline void transpose_square(const T* in, int64_t in_row, T* out, int64_t out_row, int rows, int columns) {
  using S = Simd<T>;
  constexpr int kWidth = S::kWidth;
  typename S::Vector square[kWidth];
  if (rows >= kWidth && columns >= kWidth) {
#pragma GCC unroll 16
    for (int k = 0; k < kWidth; ++k) square[k] = S::load(in + k * in_row);
    transpose_block<T>(square);
#pragma GCC unroll 16
    for (int k = 0; k < kWidth; ++k) S::store(out + k * out_row, square[k]);
  } else {
    for (int k = 0; k < kWidth; ++k) square[k] = k < rows ? S::load(in + k * in_row) : S::fill(0);
    transpose_block<T>(square);
    for (int k = 0; k < std::min(kWidth, columns); ++k) S::store(out + k * out_row, square[k]);
  }
}

// Per tap, the transpose of [inputs, outputs]: B of the input gradient, [taps * outputs, inputs].
template <class T>
void transpose(const Panels<T>& from, const T* source, const Panels<T>& to, T* target, int taps, int inputs,
               int outputs) {
  constexpr int kWidth = Simd<T>::kWidth, kColumns = Panels<T>::kColumns;
  for (int tap = 0; tap < taps; ++tap)
    for (int p = 0; p < from.count(); ++p) {
      const int64_t in_row = from.width(p), first_row = int64_t{tap} * outputs + p * kColumns;
      const T* in = source + from.start(p) + int64_t{tap} * inputs * in_row;
      for (int q = 0; q < to.count(); ++q, in += kColumns * in_row) {
        const int64_t out_row = to.width(q);
        T* out = target + to.start(q) + first_row * out_row;
        for (int o = 0; o < in_row; o += kWidth)
          for (int i = 0; i < out_row; i += kWidth)
            transpose_square<T>(in + i * in_row + o, in_row, out + o * out_row + i, out_row, inputs - q * kColumns - i,
                                outputs - p * kColumns - o);
      }
    }
}

}  // namespace metaaug::METAAUG_ISA
