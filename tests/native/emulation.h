// A GPU's blocks on the host, for csrc/cuda/block.h: one team of blocks after the other, its threads as fibers that run
// in another random order after every barrier. It finds wrong indices, missing barriers and reads of what nobody wrote;
// it says nothing about speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace metaaug::cuda::emulation {

// Work that waits until somebody waits for it, in its order; what a graph captures may be run again and again.
struct Stream {
  std::vector<std::function<void()>> queued;
  bool capturing = false;

  void run() const {
    for (const auto& work : queued) work();
  }
};

// Runs kernel() in every thread of every block, of which each team has `members`; throws std::logic_error if threads
// part at a barrier, or one writes beyond shared memory. Shared memory is full of NaN before each block. Orders come
// from METAAUG_EMULATION_SEED, or are others in each process.
void run(int teams, int members, int threads, size_t shared_bytes, const std::function<void()>& kernel);

int thread();
int threads();
int member();
int members();
int team();
int teams();
void block_sync();
bool sync_or(bool value);  // of the team
char* shared_memory();

// Gives `size` bytes at `value` to the warp's lanes, whose values `combine` makes into one, in place; every lane gets
// its own back.
void exchange(void* value, size_t size, void (*combine)(void* values));

constexpr int kWarp = 32;

template <class T>
T warp_sum(T value) {
  exchange(&value, sizeof(T), [](void* values) {
    T* each = static_cast<T*>(values);
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
      T sums[kWarp];
      for (int i = 0; i < kWarp; ++i) sums[i] = each[i] + each[i ^ apart];
      for (int i = 0; i < kWarp; ++i) each[i] = sums[i];
    }
  });
  return value;
}

// A tensor core's roundings, and its product of what the lanes of a warp hold; see csrc/cuda/block.h.
uint32_t as_tf32(float value);
uint32_t as_bf16_pair(float low, float high);
void multiply_fragments(bool bf16, float* sum, const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace metaaug::cuda::emulation
