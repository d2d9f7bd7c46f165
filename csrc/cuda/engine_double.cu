#include "executor.h"

namespace metaaug::cuda {

template std::unique_ptr<Engine<double>> make_engine<double>(const Graph&, void*);
template void draw_episodes<double>(const Episodes<double>&, void*);

}  // namespace metaaug::cuda
