// The GPU engine: a call becomes a launch over all its tasks, and one for each sum over them.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../call.h"

namespace metaaug::cuda {

// What a call may use: the stream that it is to be queued on, and memory that lives until the stream has passed it.
struct Resources {
  void* stream = nullptr;
  std::function<void*(int64_t bytes)> allocate;
};

// Kernel arguments have 4 KiB, so a model has at most so many parameters, and batch norms with frozen statistics.
inline constexpr int kMostParameters = 96, kMostFrozen = 48;

// Rows and columns of a picture, with those around it and a stride: see Tap.
inline constexpr int kMostSide = 1 << 14;

inline void at_most(int most, const char* of, int64_t got) {
  if (got > most)
    throw std::invalid_argument("the CUDA engine takes at most " + std::to_string(most) + " " + of + " (got " +
                                std::to_string(got) + ")");
}

// Throws std::invalid_argument where a graph is too large for that.
inline void check(const Graph& graph) {
  at_most(kMostParameters, "parameter tensors", int64_t(graph.parameters.size()));
  at_most(kMostFrozen, "batch norms with frozen statistics",
          std::count_if(graph.ops.begin(), graph.ops.end(), [](const Op& op) { return op.buffer[0] >= 0; }));
  for (const Op& op : graph.ops) {
    if (op.kind != OpKind::kConv2d) continue;
    const Shape& in = graph.values[op.input[0]];
    const int side = std::max(in.height + 2 * op.padding.y + op.stride.y, in.width + 2 * op.padding.x + op.stride.x);
    at_most(kMostSide, "rows or columns of a convolution's picture, its padding and stride", side);
  }
}

// Bytes that a task needs to run in one block's shared memory, and those that a block has there.
struct Footprint {
  int64_t task, block;
};

template <class T>
class Engine {
 public:
  virtual ~Engine() = default;

  // Of a meta-step with so many samples in each set.
  virtual Footprint footprint(const Settings& settings, int samples, void* stream) = 0;

  // Queues the call, whose pointers are the device's, and does not wait for it. So what is returned is what an earlier
  // call on this engine has met that was not finite, and then nothing is queued; with `wait`, or METAAUG_SYNC=1, it is
  // of this call. Calls on one engine are in one stream or wait for each other, by the caller's care. A CUDA graph may
  // capture a call whose like has run before; what its replays meet, a later call tells.
  virtual NonFinite run(const Call<T>& call, const Resources& resources, bool wait) = 0;
};

enum class Pixel { kByte, kFloat, kDouble };

// Where images lie and where a batch goes; as in data/images.py.
template <class T>
struct Episodes {
  const void* images = nullptr;  // [N, sample], grouped by class
  Pixel pixel = Pixel::kByte;    // bytes are handed out divided by 255
  int64_t sample = 0, classes = 0;
  const int64_t *first = nullptr, *sizes = nullptr;  // [classes]
  uint64_t key = 0;                                  // of the batch
  int tasks = 0, ways = 0, shots = 0, queries = 0;
  T *support_x = nullptr, *query_x = nullptr;
  int64_t *support_y = nullptr, *query_y = nullptr;

  METAAUG_HD int rows() const { return shots + queries; }
  int64_t shared_bytes() const { return int64_t(sizeof(int64_t)) * ways * (1 + rows()); }
};

// Queues the drawing of a batch.
template <class T>
void draw_episodes(const Episodes<T>& episodes, void* stream);

// For the current device, of a graph that has passed the check.
template <class T>
std::unique_ptr<Engine<T>> make_engine(const Graph& graph, void* stream = nullptr);

}  // namespace metaaug::cuda
