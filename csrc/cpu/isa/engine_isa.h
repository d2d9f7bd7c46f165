// Included by one translation unit per instruction set, which has set METAAUG_ISA, METAAUG_VECTOR_BYTES and, where
// the compiler needs it, opened a target region. What standard.h includes comes before that region: what is inline
// there is shared with every other translation unit and must stay baseline code.
#include "../executor.h"

namespace metaaug::METAAUG_ISA {

std::unique_ptr<cpu::Engine<float>> make_float(const Graph& graph) { return std::make_unique<Executor<float>>(graph); }
std::unique_ptr<cpu::Engine<double>> make_double(const Graph& graph) {
  return std::make_unique<Executor<double>>(graph);
}

}  // namespace metaaug::METAAUG_ISA
