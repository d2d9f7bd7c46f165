// Vectors of METAAUG_VECTOR_BYTES bytes. Compiled once for each instruction set, inside namespace METAAUG_ISA.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace metaaug::METAAUG_ISA {

template <class T>
struct Simd {
  static constexpr int kWidth = METAAUG_VECTOR_BYTES / int(sizeof(T));
  typedef T Vector __attribute__((vector_size(METAAUG_VECTOR_BYTES), aligned(sizeof(T)), may_alias));

  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Bits __attribute__((vector_size(METAAUG_VECTOR_BYTES)));

  static Vector load(const T* p) { return *reinterpret_cast<const Vector*>(p); }
  static void store(T* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
  // Minus zero, unlike plus, leaves every x as it is: the compiler makes it a plain broadcast.
  static Vector fill(T x) { return x - Vector{}; }
  // All zeros where v is finite.
  static Bits poison(Vector v) { return (Bits)(v - v); }
};

// Element j of the result is element kPick(j) of a, or of b from kWidth on.
template <class T, class Pick, int... kLane>
inline typename Simd<T>::Vector shuffle(typename Simd<T>::Vector a, typename Simd<T>::Vector b, Pick,
                                        std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pick::at(kLane)...);
#else
  return __builtin_shuffle(a, b, typename Simd<T>::Bits{Pick::at(kLane)...});
#endif
}

// Of a and b, each cut into blocks of kBlock: the even ones (or the odd ones) of both, in turn.
template <int kBlock, int kWidth, bool kOdd>
struct PickBlocks {
  static constexpr int at(int lane) {
    const int inside = lane & ~kBlock;
    return (inside | (kOdd ? kBlock : 0)) + (lane & kBlock ? kWidth : 0);
  }
};

// Transposes a square block in registers: ever smaller blocks off the diagonal change places.
template <class T, int kBlock = Simd<T>::kWidth / 2>
inline void transpose_block(typename Simd<T>::Vector (&rows)[Simd<T>::kWidth]) {
  constexpr int kWidth = Simd<T>::kWidth;
  constexpr std::make_integer_sequence<int, kWidth> lanes;
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & kBlock) continue;
    const auto a = rows[i], b = rows[i + kBlock];
    rows[i] = shuffle<T>(a, b, PickBlocks<kBlock, kWidth, false>(), lanes);
    rows[i + kBlock] = shuffle<T>(a, b, PickBlocks<kBlock, kWidth, true>(), lanes);
  }
  if constexpr (kBlock > 1) transpose_block<T, kBlock / 2>(rows);
}

template <class T>
constexpr int64_t pad(int64_t channels) {
  return (channels + Simd<T>::kWidth - 1) / Simd<T>::kWidth * Simd<T>::kWidth;
}

}  // namespace metaaug::METAAUG_ISA
