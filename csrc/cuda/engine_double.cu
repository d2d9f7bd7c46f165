#include "executor.h"

namespace metaaug::cuda {

template std::unique_ptr<Engine<double>> make_engine<double>(const Graph&);

}  // namespace metaaug::cuda
