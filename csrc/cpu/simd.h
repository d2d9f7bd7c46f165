// Vectors of METAAUG_VECTOR_BYTES bytes. Compiled once for each instruction set, inside namespace METAAUG_ISA.
#pragma once

#include <cstdint>

namespace metaaug::METAAUG_ISA {

template <class T>
struct Simd {
  static constexpr int kWidth = METAAUG_VECTOR_BYTES / int(sizeof(T));
  typedef T Vector __attribute__((vector_size(METAAUG_VECTOR_BYTES), aligned(sizeof(T)), may_alias));

  static Vector load(const T* p) { return *reinterpret_cast<const Vector*>(p); }
  static void store(T* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
  // Minus zero, unlike plus, leaves every x as it is: the compiler makes it a plain broadcast.
  static Vector fill(T x) { return x - Vector{}; }
};

template <class T>
constexpr int64_t pad(int64_t channels) {
  return (channels + Simd<T>::kWidth - 1) / Simd<T>::kWidth * Simd<T>::kWidth;
}

}  // namespace metaaug::METAAUG_ISA
