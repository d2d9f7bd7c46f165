// Plans on the host: a network for a number of samples, and where a task's buffers lie.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "device.h"
#include "ops/table.h"

namespace metaaug::cuda {

inline constexpr int64_t kMostElements = int64_t{1} << 30;  // of anything of a task: they are counted in 32 bits

// So many elements and what is missing to a whole number of 16 bytes.
inline int64_t rounded(int64_t elements) { return (elements + 3) / 4 * 4; }

// A place for so many elements, from a whole number of 16 bytes on.
inline int64_t take(int64_t& total, int64_t elements) {
  const int64_t at = total;
  total += rounded(elements);
  return at;
}

// A Program, and the device memory of its arrays.
class Network {
 public:
  Network(const Graph& graph, const std::vector<int64_t>& offsets, int images, const std::vector<char>& adapted,
          const std::vector<char>& wanted, bool wants_input, bool repeats, void* stream) {
    const Flow flow(graph, adapted, wanted, wants_input, repeats);
    Program& p = program_;
    p.count = int(graph.ops.size());
    p.images = images;
    p.output = graph.output;
    p.output_moves = flow.moves[graph.output];
    p.sample = graph.values[0];
    p.result = graph.values[graph.output];
    std::vector<Place> places(graph.values.size());
    p.input = rounded(images * p.sample.size());
    for (size_t v = 0; v < places.size(); ++v) {
      const int64_t size = images * graph.values[v].size();
      Place& place = places[v];
      place.still = flow.still_value[v];
      place.border = flow.border[v];
      if (v > 0) place.value = take(place.still ? p.still : p.values, size);
      if (flow.moves[v] || flow.reaches[v] || int(v) == graph.output)
        place.adjoint = take(place.border ? p.carried : p.adjoints, size);
    }
    std::vector<int> uses(graph.parameters.size());
    int64_t taps_count = 0;
    for (const Op& op : graph.ops) {
      for (int param : op.param)
        if (param >= 0) ++uses[param];
      taps_count += taps_of(op, graph.values[op.input[0]]) + taps_of(op, graph.values[op.output]);
    }
    updated_.assign(graph.parameters.size(), false);
    taps_.resize(taps_count);
    std::vector<Tap> taps;
    std::vector<Node> nodes;
    std::vector<char> is_relu(graph.values.size());  // of a product
    for (size_t i = 0; i < graph.ops.size(); ++i) {
      const Op& op = graph.ops[i];
      Node node;
      node.op = op;
      node.out = graph.values[op.output];
      node.inner = flow.inner[i];
      node.outer = flow.outer[i];
      node.still = flow.still[i];
      for (int j = 0; j < 2; ++j) {
        if (op.input[j] >= 0) {
          node.in[j] = graph.values[op.input[j]];
          node.moves[j] = flow.moves[op.input[j]];
          node.masked[j] = is_relu[op.input[j]];
        }
        if (op.param[j] < 0) continue;
        const Parameter& parameter = graph.parameters[op.param[j]];
        node.adapted[j] = adapted[op.param[j]];
        node.updates[j] = node.inner.dp[j] && uses[op.param[j]] == 1 && parameter.rows == 1;
        node.param[j] = offsets[op.param[j]];
        node.rows[j] = parameter.rows;
        node.row[j] = int(parameter.size() / parameter.rows);
        updated_[op.param[j]] = node.updates[j];
      }
      is_relu[op.output] = op.kind == OpKind::kConv2d && op.relu;
      if (op.kind == OpKind::kBatchNorm && op.buffer[0] < 0 && images * node.in[0].pixels() < 2)
        throw std::invalid_argument("batch norm needs at least 2 values a channel (got 1 sample of 1 pixel)");
      node.saved = take(node.still ? p.still : p.saved, saved_size(op, node.in[0], node.out, images));
      node.saved_tangent = take(p.tangents_saved, saved_tangent_size(op, node.in[0], images));
      add_divisors(node);
      if (op.kind == OpKind::kConv2d) add_taps(node, taps);
      nodes.push_back(node);
    }
    for (int64_t size : {p.input, p.values, p.adjoints, p.saved, p.still, p.carried})
      if (size > kMostElements)
        throw std::invalid_argument("activations of a task must have at most 2^30 elements on a GPU (got " +
                                    std::to_string(size) + ")");
    taps_.assign(taps, stream);
    nodes_.assign(nodes, stream);
    places_.assign(places, stream);
    p.nodes = nodes_.data();
    p.places = places_.data();
  }

  const Program& program() const { return program_; }

  // Of each parameter, whether an inner step of it is made where its gradient is found.
  const std::vector<char>& updated() const { return updated_; }

 private:
  static int64_t taps_of(const Op& op, const Shape& side) {
    return op.kind == OpKind::kConv2d ? int64_t{side.channels} * op.kernel.y * op.kernel.x + kTapsBehind : 0;
  }

  static void add_divisors(Node& node) {
    node.by_in_pixels = Divide(node.in[0].pixels());
    node.by_in_width = Divide(node.in[0].width);
    node.by_out_pixels = Divide(node.out.pixels());
    node.by_out_width = Divide(node.out.width);
    node.by_stride_y = Divide(node.op.stride.y);
    node.by_stride_x = Divide(node.op.stride.x);
    node.by_kernel = Divide(node.op.kernel.y * node.op.kernel.x);
  }

  void add_taps(Node& node, std::vector<Tap>& taps) const {
    const Op& op = node.op;
    const Shape &in = node.in[0], &out = node.out;
    node.taps = taps_.data() + taps.size();
    each_tap(op, in,
             [&](int channel, int y, int x) { taps.push_back({channel * in.pixels() + y * in.width + x, y, x}); });
    taps.insert(taps.end(), kTapsBehind, Tap());
    node.taps_back = taps_.data() + taps.size();
    const bool unit = op.stride.y == 1 && op.stride.x == 1;
    each_tap(op, out, [&](int channel, int y, int x) {
      taps.push_back({channel * out.pixels() - (unit ? y * out.width + x : 0), -y, -x});
    });
    taps.insert(taps.end(), kTapsBehind, Tap());
  }

  template <class Body>
  static void each_tap(const Op& op, const Shape& side, const Body& body) {
    for (int channel = 0; channel < side.channels; ++channel)
      for (int y = 0; y < op.kernel.y; ++y)
        for (int x = 0; x < op.kernel.x; ++x) body(channel, y * op.dilation.y, x * op.dilation.x);
  }

  Program program_;
  std::vector<char> updated_;
  Array<Tap, DeviceMemory> taps_;
  Array<Node, DeviceMemory> nodes_;
  Array<Place, DeviceMemory> places_;
};

// Where a task's buffers lie: from the start of its block's shared memory, or of its team's part of the workspace.
struct Layout {
  Regions regions;
  int64_t size = 0;  // elements

  // With frames for so many steps. `members` > 0: for teams of so many blocks, in the workspace.
  template <class T>
  Layout(const Arguments<T>& a, int slots, int members) {
    Regions& r = regions;
    const auto put = [&](int64_t& region, int64_t elements, bool wanted) {
      if (wanted) region = take(size, elements);
    };
    const Program& support = a.support;
    const bool second_order = a.has_support && a.reverse && !a.first_order, adam = a.optimizer == OptimizerKind::kAdam;
    const int64_t tangents = second_order ? support.values + support.adjoints + support.tangents_saved : 0;
    const int64_t query = a.has_query ? frame(a.query, a.loss, true) : 0;
    r.in_workspace = members > 0;
    r.slots_kept = slots;
    r.slot = a.has_support ? frame(support, a.loss, a.rows != nullptr) : 0;
    put(r.sums, 2 * std::max(members, 1) * kThreads / kWarp, true);
    put(r.gradient, a.flat, true);
    put(r.tangent, a.flat, second_order);
    put(r.slots, slots * r.slot, a.has_support);
    put(r.tangents, std::max(tangents, query), true);
    put(r.input, support.input, a.has_support && !a.rows);
    r.path_stride = rounded(a.flat);
    put(r.path, (a.keep_path || a.steps == 0 ? a.steps + 1 : 2) * r.path_stride, true);
    put(r.carry, a.flat, a.reverse && a.momentum != 0);
    put(r.directions, (a.keep_directions ? a.steps : 1) * a.flat, a.remembers || adam);
    put(r.second, a.flat, adam);
    put(r.still, support.still, support.still > 0);
    put(r.carried, support.carried, second_order && support.carried > 0);
    put(r.partials, int64_t{members} * kTilePartials, members > 1);
  }

  Layout() = default;

  // Elements of a frame: values, adjoints, what ops and the loss save, and its own input.
  static int64_t frame(const Program& p, LossKind loss, bool input) {
    return rounded(p.values + p.adjoints + p.saved + p.probabilities(loss) + (input ? p.input : 0));
  }
};

}  // namespace metaaug::cuda
