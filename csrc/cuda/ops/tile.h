// Products of matrices whose elements are found by functions of their indices, tile by tile through shared memory: what
// convolutions of pictures in global memory come down to. A tile is 16 sums a thread, of float32 products or of a
// tensor core's.
//
// The blocks of a team share the tiles, or, where these do not go round, the sums' terms: a block takes a stretch of
// all tiles' terms, stores the tiles that it has whole, and leaves parts of others for one block to add up, in order.
#pragma once

#include <type_traits>

#include "op.h"

namespace metaaug::cuda {

inline constexpr int kTileSums = 16;   // of a thread
inline constexpr int kTileDepth = 16;  // that shared memory has at a time

template <int kRows, int kColumns>
struct TileShape {
  static_assert(kRows * kColumns == kTileSums * kThreads, "16 sums a thread");
  static constexpr int rows = kRows, columns = kColumns;
  // Of a row of 16 in shared memory: a multiple of 4 for wide reads, and no two of a fragment in one bank.
  static constexpr int a_stride = kRows + 8, b_stride = kColumns + 8;
  static constexpr int buffer = kTileDepth * (a_stride + b_stride);

  struct Position {
    int m, n;
  };

  // Of a thread's sums 4x4 are neighbours; a warp's threads are at most 8 below each other.
  METAAUG_DEVICE static Position in_square(int t, int i) {
    constexpr int kDown = kRows / 4 < 8 ? kRows / 4 : 8, kAcross = kWarp / kDown, kWarpsDown = kRows / 4 / kDown;
    const int lane = t % kWarp, warp = t / kWarp;
    return {(warp % kWarpsDown * kDown + lane % kDown) * 4 + i % 4,
            (warp / kWarpsDown * kAcross + lane / kDown) * 4 + i / 4};
  }

  // Of a warp's 16x32 sums, fragments of 16x8.
  METAAUG_DEVICE static Position in_fragments(int t, int i) {
    const int lane = t % kWarp, warp = t / kWarp;
    return {warp % (kRows / 16) * 16 + lane / 4 + i / 2 % 2 * 8,
            warp / (kRows / 16) * 32 + i / 4 * 8 + lane % 4 * 2 + i % 2};
  }
};

using SquareTile = TileShape<kThreads == 256 ? 64 : 32, kThreads == 256 ? 64 : 32>;
using FlatTile = TileShape<16, kThreads>;  // for few rows

// Elements of shared memory that a block needs for tiles, and of global memory that each block of a team needs.
inline constexpr int kTileShared = 2 * (SquareTile::buffer > FlatTile::buffer ? SquareTile::buffer : FlatTile::buffer);
inline constexpr int kTilePartials = 2 * 2 * kTileSums * kThreads;

// What a sum's terms are products of.
template <class T>
struct Product {
  const T *a, *b;
};

// One matrix of a product: at(array, outer(i), depth(k)) is its element in row (column) i, zero where there is none;
// what outer and depth find is found once where it can be. Neighbouring threads read neighbouring k if kByDepth, else
// neighbouring i.
template <bool kByDepth, class Outer, class Depth, class At>
struct Side {
  static constexpr bool by_depth = kByDepth;
  Outer outer;
  Depth depth;
  At at;
};
template <bool kByDepth, class Outer, class Depth, class At>
METAAUG_DEVICE Side<kByDepth, Outer, Depth, At> side(const Outer& outer, const Depth& depth, const At& at) {
  return {outer, depth, at};
}

// A thread's share of one side's part of a tile: 16 of its depth at a time, on their way to shared memory.
template <class T, int kEdge, int kStride, class S>
class Loader {
  static constexpr int kCount = kEdge * kTileDepth / kThreads;
  static_assert(kCount > 0, "every thread loads");

 public:
  METAAUG_DEVICE Loader(const S& side, int first)
      : side(side),
        first(first + (S::by_depth ? block_thread() / kTileDepth : 0)),
        own(S::by_depth ? block_thread() % kTileDepth : block_thread() % kEdge),
        outer(side.outer(first + own)) {}

  METAAUG_DEVICE void fetch(const T* array, int from) {
    if constexpr (S::by_depth) {
      const auto place = side.depth(from + own);
      for (int j = 0; j < kCount; ++j)
        values[j] = side.at(array, side.outer(first + j * (kThreads / kTileDepth)), place);
    } else {
      for (int j = 0; j < kCount; ++j)
        values[j] = side.at(array, outer, side.depth(from + block_thread() / kEdge + j * (kThreads / kEdge)));
    }
  }

  METAAUG_DEVICE void stash(T* shared) const {
    const int t = block_thread();
    for (int j = 0; j < kCount; ++j) {
      if constexpr (S::by_depth)
        shared[own * kStride + t / kTileDepth + j * (kThreads / kTileDepth)] = values[j];
      else
        shared[(t / kEdge + j * (kThreads / kEdge)) * kStride + own] = values[j];
    }
  }

 private:
  const S side;
  const int first, own;
  const decltype(std::declval<S>().outer(0)) outer;
  T values[kCount];
};

template <class T, class Shape>
class Tile {
 public:
  METAAUG_DEVICE explicit Tile(const TileRoom<T>& room) : room(room) {}

  // The sum over terms, at least one, and k of a[m, k] b[n, k], handed to store(m, n, value); every thread of the team
  // must call.
  // `turn`: 0 or 1, another one than of a product that no barrier divides from this one.
  template <class A, class B, class Store>
  METAAUG_DEVICE void multiply(int turn, int rows, int columns, int depth, const Product<T>* products, int terms,
                               const A& a, const B& b, const Store& store) const {
    const int down = (rows + Shape::rows - 1) / Shape::rows, across = (columns + Shape::columns - 1) / Shape::columns;
    const int tiles = down * across, chunks = (depth + kTileDepth - 1) / kTileDepth * terms, work = tiles * chunks;
    const bool shares = members() > 1 && chunks > 1 && tiles % members() != 0 && tiles < 4 * members();
    const Shares all(work);
    const int first = shares ? all.begin(member()) : member() * chunks, last = shares ? all.begin(member() + 1) : work;
    const auto part = [&](int m, bool opens) {
      return room.partials + ((turn * members() + m) * 2 + opens) * kTileSums * kThreads + block_thread();
    };
    for (int at = first; at < last;) {
      const int tile = at / chunks, from = at - tile * chunks;
      const int to = last - at < chunks - from ? from + last - at : chunks;
      T sums[kTileSums] = {};
      add_chunks(sums, tile % down * Shape::rows, tile / down * Shape::columns, depth, products, from, to, a, b);
      if (from == 0 && to == chunks)
        put(sums, tile, down, rows, columns, store);
      else
        for (int i = 0; i < kTileSums; ++i) part(member(), from == 0)[i * kThreads] = sums[i];
      at += shares ? to - from : members() * chunks;
    }
    if (!shares) return;
    sync();
    for (int tile = member(); tile < tiles; tile += members()) {
      const int opener = all.owner(tile * chunks), closer = all.owner(tile * chunks + chunks - 1);
      if (opener == closer) continue;
      T sums[kTileSums];
      for (int i = 0; i < kTileSums; ++i) sums[i] = part(opener, true)[i * kThreads];
      for (int m = opener + 1; m <= closer; ++m)
        for (int i = 0; i < kTileSums; ++i) sums[i] += part(m, false)[i * kThreads];
      put(sums, tile, down, rows, columns, store);
    }
  }

 private:
  // Equal stretches of some work for the blocks of a team; the first ones may have one piece more.
  struct Shares {
    int least, longer;
    METAAUG_DEVICE explicit Shares(int work) : least(work / members()), longer(work % members()) {}
    METAAUG_DEVICE int begin(int m) const { return m * least + (m < longer ? m : longer); }
    METAAUG_DEVICE int owner(int at) const {
      const int head = longer * (least + 1);
      return at < head ? at / (least + 1) : longer + (at - head) / least;
    }
  };

  METAAUG_DEVICE bool exact() const { return !std::is_same_v<T, float> || room.precision == Precision::kFloat32; }

  template <class Store>
  METAAUG_DEVICE void put(const T (&sums)[kTileSums], int tile, int down, int rows, int columns,
                          const Store& store) const {
    const int t = block_thread();
    for (int i = 0; i < kTileSums; ++i) {
      const auto at = exact() ? Shape::in_square(t, i) : Shape::in_fragments(t, i);
      const int m = tile % down * Shape::rows + at.m, n = tile / down * Shape::columns + at.n;
      if (m < rows && n < columns) store(m, n, sums[i]);
    }
  }

  // Two buffers: while one is used, the other is filled from what was fetched before. On return both are free.
  template <class A, class B>
  METAAUG_DEVICE void add_chunks(T (&sums)[kTileSums], int first_row, int first_column, int depth,
                                 const Product<T>* products, int from, int to, const A& a, const B& b) const {
    Loader<T, Shape::rows, Shape::a_stride, A> as(a, first_row);
    Loader<T, Shape::columns, Shape::b_stride, B> bs(b, first_column);
    const int a_term = (depth + kTileDepth - 1) / kTileDepth;
    const Product<T>* product = products + from / a_term;
    int k = from % a_term * kTileDepth;
    const auto fetch = [&] {
      as.fetch(in_global(product->a), k);
      bs.fetch(in_global(product->b), k);
      if ((k += kTileDepth) >= depth) k = 0, ++product;
    };
    const auto buffer = [](int which) { return reinterpret_cast<T*>(shared_memory()) + which * Shape::buffer; };
    const auto stash = [&](T* to) {
      as.stash(to);
      bs.stash(to + kTileDepth * Shape::a_stride);
    };
    fetch();
    stash(buffer(0));
    block_sync();
    for (int left = to - from, here = 0; left > 0; --left, here ^= 1) {
      if (left > 1) fetch();
      add(sums, buffer(here), buffer(here) + kTileDepth * Shape::a_stride);
      if (left > 1) stash(buffer(here ^ 1));
      block_sync();
    }
  }

  METAAUG_DEVICE void add(T (&sums)[kTileSums], const T* as, const T* bs) const {
    if constexpr (std::is_same_v<T, float>) {
      if (room.precision == Precision::kTf32) return add_fragments<8>(sums, as, bs);
      if (room.precision == Precision::kBf16) return add_fragments<16>(sums, as, bs);
    }
    struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
      T v[4];
    };
    const auto at = Shape::in_square(block_thread(), 0);
    for (int k = 0; k < kTileDepth; ++k) {
      const Four x = *reinterpret_cast<const Four*>(as + k * Shape::a_stride + at.m);
      const Four y = *reinterpret_cast<const Four*>(bs + k * Shape::b_stride + at.n);
      for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 4; ++i) sums[4 * j + i] += x.v[i] * y.v[j];
    }
  }

  // kDeep: 8 in TF32, 16 in bf16.
  template <int kDeep>
  METAAUG_DEVICE void add_fragments(float (&sums)[kTileSums], const float* as, const float* bs) const {
    const int lane = block_thread() % kWarp, g = lane / 4, i = lane % 4;
    const auto at = Shape::in_fragments(block_thread(), 0);
    const float *a = as + at.m, *b = bs + (at.n - 2 * i) + g;
    // What a register holds: of one depth or of two neighbouring ones.
    const auto read = [](const float* from, int stride, int k) {
      if constexpr (kDeep == 8) return as_tf32(from[k * stride]);
      return as_bf16_pair(from[2 * k * stride], from[(2 * k + 1) * stride]);
    };
    for (int first = 0; first < kTileDepth; first += kDeep) {
      const float *a_here = a + first * Shape::a_stride, *b_here = b + first * Shape::b_stride;
      const uint32_t x[4] = {read(a_here, Shape::a_stride, i), read(a_here + 8, Shape::a_stride, i),
                             read(a_here, Shape::a_stride, i + 4), read(a_here + 8, Shape::a_stride, i + 4)};
      for (int j = 0; j < 4; ++j) {
        const uint32_t y[2] = {read(b_here + 8 * j, Shape::b_stride, i), read(b_here + 8 * j, Shape::b_stride, i + 4)};
        multiply_fragments(room.precision, sums + 4 * j, x, y);
      }
    }
  }

  const TileRoom<T> room;
};

// Which tiles fit best.
template <class T, class A, class B, class Store>
METAAUG_DEVICE void multiply_tiles(const TileRoom<T>& room, int turn, int rows, int columns, int depth,
                                   const Product<T>* products, int terms, const A& a, const B& b, const Store& store) {
  if (rows <= FlatTile::rows && columns > FlatTile::rows)
    Tile<T, FlatTile>(room).multiply(turn, rows, columns, depth, products, terms, a, b, store);
  else
    Tile<T, SquareTile>(room).multiply(turn, rows, columns, depth, products, terms, a, b, store);
}

}  // namespace metaaug::cuda
