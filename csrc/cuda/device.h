// The host's side of a GPU: memory, copies, launches. Without nvcc, that of tests/native/emulation.h.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.h"

namespace metaaug::cuda {

// What a block may have of shared memory: METAAUG_SHARED_BYTES can make it less, for tests of what then happens.
inline int64_t shared_bytes_of(int64_t most) {
  const char* asked = std::getenv("METAAUG_SHARED_BYTES");
  return asked ? std::min<int64_t>(std::strtoll(asked, nullptr, 10), most) : most;
}

#if defined(__CUDACC__)
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

struct Limits {
  int multiprocessors = 0;
  int64_t shared_bytes = 0, shared_bytes_of_all = 0;  // of a block; of a multiprocessor

  static Limits of_current_device() {
    constexpr int kStatic = 64;  // what block.h itself has there
    int device = 0, values[3] = {};
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&values[0], cudaDevAttrMultiProcessorCount, device));
    check(cudaDeviceGetAttribute(&values[1], cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check(cudaDeviceGetAttribute(&values[2], cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    return {values[0], shared_bytes_of(values[1] - kStatic), values[2]};
  }
};

struct DeviceMemory {
  static void* allocate(size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes));
    return memory;
  }
  static void free(void* memory) { cudaFree(memory); }
};

// Memory of the host that the device writes to.
struct SharedMemory {
  static void* allocate(size_t bytes) {
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
    return memory;
  }
  static void free(void* memory) { cudaFreeHost(memory); }
};

inline void to_device(void* target, const void* source, size_t bytes) {
  check(cudaMemcpy(target, source, bytes, cudaMemcpyHostToDevice));
}
inline void from_device(void* target, const void* source, size_t bytes) {
  check(cudaMemcpy(target, source, bytes, cudaMemcpyDeviceToHost));
}
inline void wait(void* stream) { check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream))); }

// How many blocks of a kernel are at work at once.
template <class Arguments>
int resident(const Limits& limits, void (*kernel)(Arguments), int64_t shared_bytes) {
  int blocks = 0;
  if (shared_bytes > (48 << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared_bytes));
  return blocks * limits.multiprocessors;
}

// Of teams of several blocks, all must be resident.
template <class Arguments>
void launch(void (*kernel)(Arguments), int teams, int members, int64_t shared_bytes, void* stream,
            Arguments arguments) {
  void* pointers[] = {&arguments};
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > (48 << 10))
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  const dim3 grid(members, teams);
  check(members > 1 ? cudaLaunchCooperativeKernel(function, grid, dim3(kThreads), pointers, shared_bytes, queue)
                    : cudaLaunchKernel(function, grid, dim3(kThreads), pointers, shared_bytes, queue));
}

inline void clear(void* memory, size_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}
#else
struct Limits {
  static constexpr int64_t kMostShared = 400 << 10;
  int multiprocessors = 6;
  int64_t shared_bytes = 0, shared_bytes_of_all = 0;

  static Limits of_current_device() {
    const int64_t bytes = shared_bytes_of(kMostShared);
    return {6, bytes, bytes};
  }
};

struct DeviceMemory {
  static void* allocate(size_t bytes) { return std::memset(::operator new(bytes), 0xff, bytes); }
  static void free(void* memory) { ::operator delete(memory); }
};
using SharedMemory = DeviceMemory;

inline void to_device(void* target, const void* source, size_t bytes) { std::memcpy(target, source, bytes); }
inline void from_device(void* target, const void* source, size_t bytes) { std::memcpy(target, source, bytes); }
inline void wait(void*) {}

template <class Arguments>
int resident(const Limits& limits, void (*)(Arguments), int64_t) {
  return limits.multiprocessors;
}

template <class Arguments>
void launch(void (*kernel)(Arguments), int teams, int members, int64_t shared_bytes, void*,
            const Arguments& arguments) {
  emulation::run(teams, members, kThreads, size_t(shared_bytes), [&] { kernel(arguments); });
}

inline void clear(void* memory, size_t bytes, void*) { std::memset(memory, 0, bytes); }
#endif

// An array that outlives a call.
template <class Value, class Memory>
class Array {
 public:
  void resize(int64_t count) {
    if (count <= count_) return;
    memory_.reset(static_cast<Value*>(Memory::allocate(size_t(count) * sizeof(Value))));
    count_ = count;
  }
  void assign(const std::vector<Value>& values) {
    resize(int64_t(values.size()));
    if (!values.empty()) to_device(data(), values.data(), values.size() * sizeof(Value));
  }
  Value* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(Value* memory) const { Memory::free(memory); }
  };
  std::unique_ptr<Value, Free> memory_;
  int64_t count_ = 0;
};

}  // namespace metaaug::cuda
