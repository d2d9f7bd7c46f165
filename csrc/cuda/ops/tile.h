// Products of matrices that are read through a function of their indices, tile by tile through shared memory: what
// convolutions over whole pictures come down to. Blocks of a team take tiles in turn.
#pragma once

#include "../block.h"

namespace metaaug::cuda {

// n / divisor for 0 <= n < limit by a multiplication, where that is exact.
class Divide {
 public:
  METAAUG_DEVICE Divide(int divisor, int64_t limit)
      : divisor(divisor),
        magic(divisor > 1 && limit * divisor < (int64_t{1} << 32) ? uint32_t(((uint64_t{1} << 32) - 1) / divisor + 1)
                                                                  : 0) {}
  METAAUG_DEVICE int operator()(int n) const {
    if (magic == 0) return n / divisor;
    return int((uint64_t(uint32_t(n)) * magic) >> 32);
  }

 private:
  int divisor;
  uint32_t magic;
};

// kThreads make a tile of [kRows, kColumns], 4x4 each, kDepth products at a time.
template <class T, int kThreads>
struct Tile {
  static constexpr int kEdge = kThreads == 256 ? 64 : 32, kDepth = 16, kStride = kEdge + 1, kAcross = kEdge / 4;
  static constexpr int kSize = 2 * kDepth * kStride;  // elements of shared memory
  static_assert(kThreads == 256 || kThreads == 64, "a thread makes 4x4 of a square tile");

  // store(m, n, value) of the sum over terms and k of a(term, a_row(m), k) b(term, k, n). Neighbouring threads read
  // neighbouring m, or neighbouring k if `a_by_depth`; of b always the latter.
  template <class Row, class A, class B, class Store>
  METAAUG_DEVICE static void multiply(T* shared, int rows, int columns, int depth, int terms, bool a_by_depth,
                                      const Row& a_row, const A& a, const B& b, const Store& store) {
    T *as = shared, *bs = shared + kDepth * kStride;
    const int down = (rows + kEdge - 1) / kEdge, across = (columns + kEdge - 1) / kEdge;
    const int t = block_thread(), m0 = t % kAcross, n0 = t / kAcross;
    for (int tile = member(); tile < down * across; tile += members()) {
      const int first_row = tile % down * kEdge, first_column = tile / down * kEdge;
      T sum[4][4] = {};
      const int own_row = first_row + t % kEdge;  // of a's loads that go by rows
      const auto own = a_row(own_row < rows ? own_row : 0);
      for (int term = 0; term < terms; ++term)
        for (int first = 0; first < depth; first += kDepth) {
          block_sync();  // the tile before is used
          for (int i = t; i < kEdge * kDepth; i += kThreads) {
            const int by_depth_k = i % kDepth, by_depth = i / kDepth;
            if (a_by_depth) {
              const int m = first_row + by_depth, k = first + by_depth_k;
              as[by_depth_k * kStride + by_depth] = m < rows && k < depth ? a(term, a_row(m), k) : T(0);
            } else {
              const int k = first + i / kEdge;
              as[i / kEdge * kStride + i % kEdge] = own_row < rows && k < depth ? a(term, own, k) : T(0);
            }
            const int n = first_column + by_depth, k = first + by_depth_k;
            bs[by_depth_k * kStride + by_depth] = n < columns && k < depth ? b(term, k, n) : T(0);
          }
          block_sync();
          for (int k = 0; k < kDepth; ++k) {
            T x[4], y[4];
            for (int i = 0; i < 4; ++i) {
              x[i] = as[k * kStride + m0 + i * kAcross];
              y[i] = bs[k * kStride + n0 + i * kAcross];
            }
            for (int i = 0; i < 4; ++i)
              for (int j = 0; j < 4; ++j) sum[i][j] += x[i] * y[j];
          }
        }
      for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 4; ++i) {
          const int m = first_row + m0 + i * kAcross, n = first_column + n0 + j * kAcross;
          if (m < rows && n < columns) store(m, n, sum[i][j]);
        }
    }
  }
};

// Elements of shared memory that a block of so many threads needs.
inline int64_t tile_size(int threads) { return threads == 256 ? Tile<float, 256>::kSize : Tile<float, 64>::kSize; }

template <class T, class Row, class A, class B, class Store>
METAAUG_DEVICE void multiply_tiles(T* shared, int rows, int columns, int depth, int terms, bool a_by_depth,
                                   const Row& a_row, const A& a, const B& b, const Store& store) {
  if (block_threads() == 256)
    Tile<T, 256>::multiply(shared, rows, columns, depth, terms, a_by_depth, a_row, a, b, store);
  else
    Tile<T, 64>::multiply(shared, rows, columns, depth, terms, a_by_depth, a_row, a, b, store);
}

}  // namespace metaaug::cuda
