// The host's side of a GPU: memory, copies, launches. Without nvcc, that of tests/native/emulation.h.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "block.h"

namespace metaaug::cuda {

// What a block may have of shared memory: METAAUG_SHARED_BYTES can make it less, for tests of what then happens.
inline int64_t shared_bytes_of(int64_t most) {
  const char* asked = std::getenv("METAAUG_SHARED_BYTES");
  return asked ? std::min<int64_t>(std::strtoll(asked, nullptr, 10), most) : most;
}

#if defined(__CUDACC__)
// An error is told once: left where CUDA keeps it, torch would find it behind some call of its own.
inline bool is_good(cudaError_t error) {
  if (error == cudaSuccess) return true;
  cudaGetLastError();
  return false;
}
inline void check(cudaError_t error) {
  if (!is_good(error)) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

inline int attribute_of_current_device(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// That a block may have, beside what block.h itself has.
inline int64_t most_shared_bytes() {
  constexpr int kStatic = 64;
  return attribute_of_current_device(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStatic;
}

struct Limits {
  int multiprocessors = 0;
  int64_t shared_bytes = 0, shared_bytes_of_all = 0;  // of a block; of a multiprocessor

  static Limits of_current_device() {
    return {attribute_of_current_device(cudaDevAttrMultiProcessorCount), shared_bytes_of(most_shared_bytes()),
            attribute_of_current_device(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  }
};

struct DeviceMemory {
  static void* allocate(size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes));
    return memory;
  }
  static void free(void* memory) { is_good(cudaFree(memory)); }
};

// Memory of the host that the device writes to.
struct SharedMemory {
  static void* allocate(size_t bytes) {
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
    return memory;
  }
  static void free(void* memory) { is_good(cudaFreeHost(memory)); }
};

inline bool capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}
inline void wait(void* stream) { check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream))); }

// In the order of the stream; the host may change what it has given, and has what it gets.
inline void to_device(void* target, const void* source, size_t bytes, void* stream) {
  check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
}
inline void from_device(void* target, const void* source, size_t bytes, void* stream) {
  check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)));
  wait(stream);
}
inline void clear(void* memory, size_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}

// Lets a kernel have all the shared memory that there is; any less would be taken from launches of other threads.
template <class Arguments>
void allow_shared_memory(void (*kernel)(Arguments)) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most_shared_bytes())));
}

// How many blocks of a kernel are at work at once.
template <class Arguments>
int resident(const Limits& limits, void (*kernel)(Arguments), int64_t shared_bytes) {
  int blocks = 0;
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
  const dim3 grid(members, teams);
  check(members > 1 ? cudaLaunchCooperativeKernel(function, grid, dim3(kThreads), pointers, shared_bytes, queue)
                    : cudaLaunchKernel(function, grid, dim3(kThreads), pointers, shared_bytes, queue));
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

// Without a stream, at once.
inline void queue(void* stream, std::function<void()> work) {
  if (!stream) return work();
  static_cast<emulation::Stream*>(stream)->queued.push_back(std::move(work));
}
inline bool capturing(void* stream) { return stream && static_cast<emulation::Stream*>(stream)->capturing; }
inline void wait(void* stream) {
  if (!stream) return;
  if (capturing(stream)) throw std::logic_error("nobody waits for what is captured");
  static_cast<emulation::Stream*>(stream)->run();
  static_cast<emulation::Stream*>(stream)->queued.clear();
}

inline void to_device(void* target, const void* source, size_t bytes, void* stream) {
  const char* const from = static_cast<const char*>(source);
  queue(stream, [=, staged = std::vector<char>(from, from + bytes)] { std::memcpy(target, staged.data(), bytes); });
}
inline void from_device(void* target, const void* source, size_t bytes, void* stream) {
  queue(stream, [=] { std::memcpy(target, source, bytes); });
  wait(stream);
}
inline void clear(void* memory, size_t bytes, void* stream) {
  queue(stream, [=] { std::memset(memory, 0, bytes); });
}

template <class Arguments>
void allow_shared_memory(void (*)(Arguments)) {}

template <class Arguments>
int resident(const Limits& limits, void (*)(Arguments), int64_t) {
  return limits.multiprocessors;
}

template <class Arguments>
void launch(void (*kernel)(Arguments), int teams, int members, int64_t shared_bytes, void* stream,
            const Arguments& arguments) {
  queue(stream, [=] { emulation::run(teams, members, kThreads, size_t(shared_bytes), [&] { kernel(arguments); }); });
}
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
  void assign(const std::vector<Value>& values, void* stream) {
    resize(int64_t(values.size()));
    if (!values.empty()) to_device(data(), values.data(), values.size() * sizeof(Value), stream);
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
