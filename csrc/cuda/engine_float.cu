#include "executor.h"

namespace metaaug::cuda {

template std::unique_ptr<Engine<float>> make_engine<float>(const Graph&, void*);
template void draw_episodes<float>(const Episodes<float>&, void*);

}  // namespace metaaug::cuda
