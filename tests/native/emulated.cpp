// Puts the GPU engine in the emulation into the CPU engine's place: linked with csrc/ops.cpp and csrc/bindings.cpp it
// makes an extension whose every call runs the device code.
#include <chrono>
#include <thread>

#include "emulated.h"

namespace metaaug::cpu {

void check(const Graph& graph) { cuda::check(graph); }

std::string instruction_set() { return "emulation"; }

template <class T>
std::unique_ptr<Engine<T>> make_engine(const Graph& graph) {
  std::this_thread::sleep_for(std::chrono::milliseconds(2));  // so that calls of other threads come meanwhile
  return std::make_unique<Emulated<T>>(graph);
}

template std::unique_ptr<Engine<float>> make_engine<float>(const Graph&);
template std::unique_ptr<Engine<double>> make_engine<double>(const Graph&);

}  // namespace metaaug::cpu

namespace metaaug::cuda {

template std::unique_ptr<Engine<float>> make_engine<float>(const Graph&, void*);
template std::unique_ptr<Engine<double>> make_engine<double>(const Graph&, void*);
template void draw_episodes<float>(const Episodes<float>&, void*);
template void draw_episodes<double>(const Episodes<double>&, void*);

}  // namespace metaaug::cuda
