#include "executor.h"

namespace metaaug::cuda {

template std::unique_ptr<Engine<float>> make_engine<float>(const Graph&);

}  // namespace metaaug::cuda
