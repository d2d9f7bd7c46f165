// Chooses the widest instruction set at run time.
#include "engine.h"

#include <cstdlib>
#include <stdexcept>

namespace metaaug {

#define METAAUG_DECLARE(isa)                                            \
  namespace isa {                                                       \
  std::unique_ptr<cpu::Engine<float>> make_float(const Graph& graph);   \
  std::unique_ptr<cpu::Engine<double>> make_double(const Graph& graph); \
  }
METAAUG_DECLARE(baseline)
#if defined(__x86_64__)
METAAUG_DECLARE(avx2)
METAAUG_DECLARE(avx512)
#endif
#undef METAAUG_DECLARE

namespace cpu {
namespace {

bool supported(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == "baseline";
}

template <class T>
std::unique_ptr<Engine<T>> choose(std::unique_ptr<Engine<float>> (*make_float)(const Graph&),
                                  std::unique_ptr<Engine<double>> (*make_double)(const Graph&), const Graph& graph) {
  if constexpr (sizeof(T) == sizeof(float))
    return make_float(graph);
  else
    return make_double(graph);
}

}  // namespace

// A parameter that two ops read differently has no one layout.
void check(const Graph& graph) {
  for (const Op& op : graph.ops)
    for (int i = 0; i < 2; ++i) {
      if (op.param[i] < 0) continue;
      const bool matrix = op.kind == OpKind::kConv2d && i == 0, picture = op.kind == OpKind::kLayerNorm;
      const LayoutKind wanted = matrix ? LayoutKind::kMatrix : picture ? LayoutKind::kPicture : LayoutKind::kVector;
      if (graph.parameters.at(op.param[i]).layout != wanted)
        throw std::invalid_argument("a parameter is shared by ops that need it in different layouts");
    }
}

std::string instruction_set() {
  if (const char* asked = std::getenv("METAAUG_ISA")) {
    const std::string isa = asked;
    if (isa != "avx512" && isa != "avx2" && isa != "baseline")
      throw std::invalid_argument("METAAUG_ISA must be avx512, avx2 or baseline (got " + isa + ")");
    if (!supported(isa)) throw std::invalid_argument("METAAUG_ISA asks for " + isa + ", which this processor lacks");
    return isa;
  }
  for (const char* isa : {"avx512", "avx2"})
    if (supported(isa)) return isa;
  return "baseline";
}

template <class T>
std::unique_ptr<Engine<T>> make_engine(const Graph& graph) {
  const std::string isa = instruction_set();
#if defined(__x86_64__)
  if (isa == "avx512") return choose<T>(avx512::make_float, avx512::make_double, graph);
  if (isa == "avx2") return choose<T>(avx2::make_float, avx2::make_double, graph);
#endif
  return choose<T>(baseline::make_float, baseline::make_double, graph);
}

template std::unique_ptr<Engine<float>> make_engine<float>(const Graph&);
template std::unique_ptr<Engine<double>> make_engine<double>(const Graph&);

}  // namespace cpu
}  // namespace metaaug
