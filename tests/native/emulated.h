// The GPU engine in the emulation, with the face of the CPU's.
#pragma once

#include <vector>

#include "cpu/engine.h"
#include "cuda/executor.h"
#include "one_task.h"

namespace metaaug {

template <class T>
class Emulated final : public cpu::Engine<T> {
 public:
  explicit Emulated(const Graph& graph) : engine_(cuda::make_engine<T>(graph)) {}

  NonFinite run(const Call<T>& call, const cpu::Parallel&) override {
    std::vector<std::unique_ptr<char[]>> memory;
    const auto allocate = [&](int64_t bytes) -> void* {
      memory.emplace_back(new char[bytes]);
      return std::memset(memory.back().get(), 0xff, bytes);  // NaN, which nobody may use
    };
    return engine_->run(call, {nullptr, allocate}, true);
  }
  bool encode(const Encoding<T>& call, const cpu::Parallel& parallel) override {
    run(as_one_task(call), parallel);
    return true;
  }

 private:
  std::unique_ptr<cuda::Engine<T>> engine_;
};

}  // namespace metaaug
