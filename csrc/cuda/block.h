// What device code is written against: a block's threads, its barriers, sums over a warp, and shared memory. nvcc makes
// them CUDA's own; in host C++ (tests/native/emulation.h) a block's threads are fibers, and barriers are real ones.
#pragma once

#include "../math.h"

#if defined(__CUDACC__)
#define METAAUG_DEVICE __device__
#define METAAUG_NOINLINE __noinline__
#define METAAUG_KERNEL __global__
#define METAAUG_GRID_CONSTANT __grid_constant__
#else
#include "emulation.h"
#define METAAUG_DEVICE
#define METAAUG_NOINLINE
#define METAAUG_KERNEL
#define METAAUG_GRID_CONSTANT
#endif

namespace metaaug::cuda {

inline constexpr int kWarp = 32;

#if defined(__CUDACC__)
METAAUG_DEVICE inline int thread() { return int(threadIdx.x); }
METAAUG_DEVICE inline int threads() { return int(blockDim.x); }
METAAUG_DEVICE inline int block() { return int(blockIdx.x); }
METAAUG_DEVICE inline int blocks() { return int(gridDim.x); }
METAAUG_DEVICE inline void sync() { __syncthreads(); }
METAAUG_DEVICE inline bool sync_or(bool value) { return __syncthreads_or(value); }

METAAUG_DEVICE inline char* shared_memory() {
  extern __shared__ double memory[];
  return reinterpret_cast<char*>(memory);
}

// The sum over a warp, the same bits in all its lanes; every lane must call.
template <class T>
METAAUG_DEVICE T warp_sum(T value) {
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(~0U, value, apart);
  return value;
}
#else
inline int thread() { return emulation::thread(); }
inline int threads() { return emulation::threads(); }
inline int block() { return emulation::block(); }
inline int blocks() { return emulation::blocks(); }
inline void sync() { emulation::sync_or(false); }
inline bool sync_or(bool value) { return emulation::sync_or(value); }
inline char* shared_memory() { return emulation::shared_memory(); }

template <class T>
T warp_sum(T value) {
  return emulation::warp_sum(value);
}
#endif

METAAUG_DEVICE inline int lane() { return thread() % kWarp; }
METAAUG_DEVICE inline int warp() { return thread() / kWarp; }
METAAUG_DEVICE inline int warps() { return threads() / kWarp; }

// The sum over the block in every thread; `scratch` has room for a value of each warp, and is free again on return.
template <class T>
METAAUG_DEVICE T block_sum(T value, T* scratch) {
  value = warp_sum(value);
  if (lane() == 0) scratch[warp()] = value;
  sync();
  T total = 0;
  for (int i = 0; i < warps(); ++i) total += scratch[i];
  sync();
  return total;
}

// Calls body(i) for 0 <= i < count, spread over the block's threads.
template <class Body>
METAAUG_DEVICE void each(int64_t count, const Body& body) {
  for (int64_t i = thread(); i < count; i += threads()) body(i);
}

}  // namespace metaaug::cuda
