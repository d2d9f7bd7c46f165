// What device code is written against: the threads of a team, which is one block or several that work on one task,
// their barriers, sums over a warp, and shared memory. nvcc makes them CUDA's own; in host C++
// (tests/native/emulation.h) threads are fibers, and barriers are real ones.
#pragma once

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
inline char* shared_memory() { return emulation::shared_memory(); }

template <class T>
T warp_sum(T value) {
  return emulation::warp_sum(value);
}
#endif

// Of the team.
METAAUG_DEVICE inline int thread() { return member() * block_threads() + block_thread(); }
METAAUG_DEVICE inline int threads() { return members() * block_threads(); }
METAAUG_DEVICE inline int lane() { return thread() % kWarp; }
METAAUG_DEVICE inline int warp() { return thread() / kWarp; }
METAAUG_DEVICE inline int warps() { return threads() / kWarp; }

// The sum over the team in every thread; `scratch` has room for a value of each warp, and is free again on return.
template <class T>
METAAUG_DEVICE T sum_all(T value, T* scratch) {
  value = warp_sum(value);
  if (lane() == 0) scratch[warp()] = value;
  sync();
  T total = 0;
  for (int i = 0; i < warps(); ++i) total += scratch[i];
  sync();
  return total;
}

// Calls body(i) for 0 <= i < count, spread over the team's threads.
template <class Body>
METAAUG_DEVICE void each(int64_t count, const Body& body) {
  for (int64_t i = thread(); i < count; i += threads()) body(i);
}

}  // namespace metaaug::cuda
