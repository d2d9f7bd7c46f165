// The CPU engine's face.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "../call.h"

namespace metaaug::cpu {

// Runs body(item, worker) for items 0..count-1 on `workers` workers. `stopped` is asked between steps, by all of them.
struct Parallel {
  int workers = 1;
  std::function<bool()> stopped = [] { return false; };
  std::function<void(int count, const std::function<void(int item, int worker)>& body)> run;
};

template <class T>
class Engine {
 public:
  virtual ~Engine() = default;
  // Not re-entrant: calls on one engine take turns. Throws std::invalid_argument where the graph cannot take so few
  // samples.
  virtual NonFinite run(const Call<T>& call, const Parallel& parallel) = 0;
  // Whether it ran to its end, which it does unless it was stopped.
  virtual bool encode(const Encoding<T>& call, const Parallel& parallel) = 0;
};

// Throws std::invalid_argument where the graph cannot be run.
void check(const Graph& graph);

template <class T>
std::unique_ptr<Engine<T>> make_engine(const Graph& graph);

// "avx512", "avx2" or "baseline": the widest that the processor has, or what METAAUG_ISA asks for.
std::string instruction_set();

}  // namespace metaaug::cpu
