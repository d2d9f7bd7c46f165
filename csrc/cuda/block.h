// What device code is written against: the threads of a team, which is one block or several that work on one task,
// their barriers, sums over a warp, and shared memory. nvcc makes them CUDA's own; in host C++
// (tests/native/emulation.h) threads are fibers, and barriers are real ones.
#pragma once

#include "../graph.h"
#include "../math.h"

#if defined(__CUDACC__)
#define METAAUG_DEVICE __device__
#define METAAUG_NOINLINE __noinline__
#define METAAUG_KERNEL __global__
#define METAAUG_GRID_CONSTANT __grid_constant__
#define METAAUG_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#else
#include "emulation.h"
#define METAAUG_DEVICE
#define METAAUG_NOINLINE
#define METAAUG_KERNEL
#define METAAUG_GRID_CONSTANT
#define METAAUG_BOUNDS(threads, blocks)
#endif

namespace metaaug::cuda {

inline constexpr int kWarp = 32;
#if defined(__CUDACC__) || defined(METAAUG_EMULATE_ALL_THREADS)
inline constexpr int kThreads = 256;
#else
inline constexpr int kThreads = 64;
#endif

// How many blocks of a team have come to its barriers, and how many votes there were.
struct TeamState {
  unsigned arrived, votes;
};

#if defined(__CUDACC__)
// A grid is [blocks of a team, teams]; all of it is resident where a team has several blocks.
METAAUG_DEVICE inline int team() { return int(blockIdx.y); }
METAAUG_DEVICE inline int teams() { return int(gridDim.y); }
METAAUG_DEVICE inline int member() { return int(blockIdx.x); }
METAAUG_DEVICE inline int members() { return int(gridDim.x); }
METAAUG_DEVICE inline int block_thread() { return int(threadIdx.x); }
METAAUG_DEVICE inline int block_threads() { return int(blockDim.x); }
METAAUG_DEVICE inline void block_sync() { __syncthreads(); }

METAAUG_DEVICE inline TeamState*& team_state() {
  __shared__ TeamState* state;
  return state;
}

// Every thread of a kernel calls it first. `states` are zero, one for each team; null where a team is one block.
METAAUG_DEVICE inline void join_team(TeamState* states) {
  if (threadIdx.x == 0) team_state() = states + team();
  __syncthreads();
}

METAAUG_DEVICE inline void sync() {
  __syncthreads();
  if (members() == 1) return;
  if (threadIdx.x == 0) {
    __threadfence();
    volatile unsigned& arrived = team_state()->arrived;
    const unsigned size = members(), before = atomicAdd(&team_state()->arrived, 1u), goal = (before / size + 1) * size;
    while (arrived < goal) {
    }
    __threadfence();
  }
  __syncthreads();
}

METAAUG_DEVICE inline bool sync_or(bool value) {
  value = __syncthreads_or(value);
  if (members() == 1) return value;
  const unsigned before = *const_cast<volatile unsigned*>(&team_state()->votes);
  sync();
  if (value && threadIdx.x == 0) atomicAdd(&team_state()->votes, 1u);
  sync();
  return *const_cast<volatile unsigned*>(&team_state()->votes) != before;
}

// Say where a pointer leads.
template <class T>
METAAUG_DEVICE const T* in_global(const T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}
template <class T>
METAAUG_DEVICE const T* in_shared(const T* pointer) {
  __builtin_assume(__isShared(pointer));
  return pointer;
}

METAAUG_DEVICE inline char* shared_memory() {
  extern __shared__ __align__(16) double memory[];
  return reinterpret_cast<char*>(memory);
}

// The sum over a warp, the same bits in all its lanes; every lane must call.
template <class T>
METAAUG_DEVICE T warp_sum(T value) {
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(~0U, value, apart);
  return value;
}

METAAUG_DEVICE inline void put_least(unsigned long long* word, unsigned long long value) { atomicMin(word, value); }

// What a tensor core multiplies: a 16x8 sum of products, 8 deep in TF32 or 16 deep in bf16, whose values pairs of
// registers hold. With g = lane / 4 and i = lane % 4, a lane has of the sum rows g and g + 8, columns 2i and 2i + 1; of
// a (rows) and b (columns g) the depths i and i + 4, or of bf16 pairs those of 2i and 2i + 8.
METAAUG_DEVICE inline uint32_t as_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
METAAUG_DEVICE inline uint32_t as_bf16_pair(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

METAAUG_DEVICE inline void multiply_fragments(Precision precision, float* sum, const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  if (precision == Precision::kTf32)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
inline int team() { return emulation::team(); }
inline int teams() { return emulation::teams(); }
inline int member() { return emulation::member(); }
inline int members() { return emulation::members(); }
inline int block_thread() { return emulation::thread(); }
inline int block_threads() { return emulation::threads(); }
inline void block_sync() { emulation::block_sync(); }
inline void join_team(TeamState*) {}
inline void sync() { emulation::sync_or(false); }
inline bool sync_or(bool value) { return emulation::sync_or(value); }
template <class T>
const T* in_global(const T* pointer) {
  return pointer;
}
template <class T>
const T* in_shared(const T* pointer) {
  return pointer;
}
inline char* shared_memory() { return emulation::shared_memory(); }

template <class T>
T warp_sum(T value) {
  return emulation::warp_sum(value);
}

inline void put_least(unsigned long long* word, unsigned long long value) { *word = value < *word ? value : *word; }

inline uint32_t as_tf32(float value) { return emulation::as_tf32(value); }
inline uint32_t as_bf16_pair(float low, float high) { return emulation::as_bf16_pair(low, high); }
inline void multiply_fragments(Precision precision, float* sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply_fragments(precision == Precision::kBf16, sum, a, b);
}
#endif

// Of the team.
METAAUG_DEVICE inline int thread() { return member() * block_threads() + block_thread(); }
METAAUG_DEVICE inline int threads() { return members() * block_threads(); }
METAAUG_DEVICE inline int lane() { return thread() % kWarp; }
METAAUG_DEVICE inline int warp() { return thread() / kWarp; }
METAAUG_DEVICE inline int warps() { return threads() / kWarp; }

// The sum over the team, in its first warp; `scratch` has room for a value of each warp, and is free again behind the
// next barrier.
template <class T>
METAAUG_DEVICE T sum_all(T value, T* scratch) {
  value = warp_sum(value);
  if (lane() == 0) scratch[warp()] = value;
  sync();
  if (warp() > 0) return T(0);
  T total = 0;
  for (int i = lane(); i < warps(); i += kWarp) total += scratch[i];
  return warp_sum(total);
}

// Calls body(i) for 0 <= i < count, spread over the team's threads. A task has less than 2^31 elements of anything.
template <class Body>
METAAUG_DEVICE void each(int64_t count, const Body& body) {
  for (int i = thread(); i < int(count); i += threads()) body(i);
}

// The same over its warps; every lane of a warp calls.
template <class Body>
METAAUG_DEVICE void each_of_warp(int64_t count, const Body& body) {
  for (int i = warp(); i < int(count); i += warps()) body(i);
}

}  // namespace metaaug::cuda
