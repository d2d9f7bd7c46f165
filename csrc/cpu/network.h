// A graph planned for a number of samples: storage, index lists, and which adjoints each pass needs.
#pragma once

#include <stdexcept>

#include "loss.h"
#include "ops/activation.h"
#include "ops/batch_norm.h"
#include "ops/conv2d.h"
#include "ops/group_norm.h"
#include "ops/multiply.h"
#include "ops/pool.h"
#include "packing.h"

namespace metaaug::METAAUG_ISA {

template <class T, template <class> class F>
constexpr OpFunctions<T> activation_functions() {
  return {activation::plan<T>, activation::forward<T, F>, activation::backward<T, F>, activation::tangent<T, F>,
          activation::tangent_backward<T, F>};
}

template <class T, class Map>
constexpr OpFunctions<T> linear_map_functions() {
  using L = LinearMap<T, Map>;
  return {L::plan, L::forward, L::backward, L::tangent, L::tangent_backward};
}

template <class T, bool kRelu, bool kPool>
constexpr OpFunctions<T> batch_norm_functions() {
  using B = BatchNorm<T, kRelu, kPool>;
  return {B::plan, B::forward, B::backward, B::tangent, B::tangent_backward};
}

template <class T>
NormFunctions<T> norm_functions(const Op& op) {
  const auto of = [](auto norm) {
    using B = decltype(norm);
    return NormFunctions<T>{B::moments, B::settle, B::normalise, B::adjoint_sums, B::spread};
  };
  if (op.pool) return of(BatchNorm<T, true, true>());
  return op.relu ? of(BatchNorm<T, true, false>()) : of(BatchNorm<T, false, false>());
}

// The op table.
template <class T>
OpFunctions<T> functions(const Op& op) {
  switch (op.kind) {
    case OpKind::kConv2d:
      return {conv2d::plan<T>, conv2d::forward<T>, conv2d::backward<T>, conv2d::tangent<T>,
              conv2d::tangent_backward<T>};
    case OpKind::kBatchNorm:
      if (op.pool) return batch_norm_functions<T, true, true>();
      return op.relu ? batch_norm_functions<T, true, false>() : batch_norm_functions<T, false, false>();
    case OpKind::kLayerNorm:
    case OpKind::kGroupNorm:
      return {group_norm::plan<T>, group_norm::forward<T>, group_norm::backward<T>, group_norm::tangent<T>,
              group_norm::tangent_backward<T>};
    case OpKind::kRelu:
      return activation_functions<T, Relu>();
    case OpKind::kLeakyRelu:
      return activation_functions<T, LeakyRelu>();
    case OpKind::kGelu:
      return activation_functions<T, Gelu>();
    case OpKind::kGeluTanh:
      return activation_functions<T, GeluTanh>();
    case OpKind::kTanh:
      return activation_functions<T, Tanh>();
    case OpKind::kSigmoid:
      return activation_functions<T, Sigmoid>();
    case OpKind::kSoftplus:
      return activation_functions<T, Softplus>();
    case OpKind::kMaxPool:
      return linear_map_functions<T, MaxPool<T>>();
    case OpKind::kAvgPool:
      return linear_map_functions<T, AvgPool<T>>();
    case OpKind::kMeanPool:
      return linear_map_functions<T, MeanPool<T>>();
    case OpKind::kFlatten:
      return linear_map_functions<T, Flatten<T>>();
    case OpKind::kAdd:
      return linear_map_functions<T, Add<T>>();
    case OpKind::kMultiply:
      return {multiply::plan<T>, multiply::forward<T>, multiply::backward<T>, multiply::tangent<T>,
              multiply::tangent_backward<T>};
    case OpKind::kDropout:
      return linear_map_functions<T, Dropout<T>>();
  }
  return {};
}

// Buffers of one pass. `values` and `saved` hold a step's activations, `adjoints` their gradients; a Hessian-vector
// product has the same three for tangents. Adjoints that nobody reads after the pass share memory: `passing`, or those
// alone that no such product reads, `unread`.
template <class T>
struct Frame {
  T *input = nullptr, *values = nullptr, *adjoints = nullptr, *saved = nullptr, *unread = nullptr;
  T *still = nullptr, *carried = nullptr;  // see Network::still
  bool passing = false;
};

template <class T>
struct Network : Flow {
  const Graph* graph;
  int images;
  const Op* patches = nullptr;  // the first convolution, if the input is laid out as what its pixels read
  std::vector<Layout> values;
  std::vector<OpPlan<T>> ops;
  std::vector<OpFunctions<T>> functions;
  std::vector<int64_t> value_at, saved_at, saved_tangent_at, constants_at;
  std::vector<int64_t> adjoint_at, unread_at, passing_at;  // of adjoints: kept, or -1 and unread; where all pass
  int64_t values_size = 0, saved_size = 0, saved_tangent_size = 0, scratch_size = 0, input_size = 0;
  int64_t adjoints_size = 0, unread_size = 0, passing_size = 0;
  // Values between a convolution whose input wants no adjoint and its batch norm: their adjoint is handed over picture
  // by picture, and there is room for one.
  std::vector<char> streamed;
  // Others between a convolution and its batch norm: in a frame whose values pass too, the adjoint takes their place.
  std::vector<char> over_value;
  std::vector<int64_t> carried_at;  // of the border's adjoints
  int64_t still_size = 0, carried_size = 0;
  LossPlan<T> loss;

  Network(const Graph& g, int images, const std::vector<char>& adapted, const std::vector<char>& wanted,
          bool wants_input, bool repeats)
      : Flow(g, adapted, wanted, wants_input, repeats), graph(&g), images(images) {
    find_border();
    lay_out(wants_input);
    find_places_of_adjoints();
    lay_out_adjoints();
    lay_out_passing_adjoints();
    loss.images = images;
    loss.classes = values[g.output].shape.channels;
    loss.stride = values[g.output].stride;
  }

  T* value(const Frame<T>& frame, int v) const {
    return v == 0 ? frame.input : (still_value[v] ? frame.still : frame.values) + value_at[v];
  }
  T* saved(const Frame<T>& frame, size_t op) const { return (still[op] ? frame.still : frame.saved) + saved_at[op]; }
  T* adjoint(const Frame<T>& frame, int v) const {
    if (border[v]) return frame.carried + carried_at[v];
    if (frame.passing) return over_value[v] ? value(frame, v) : frame.adjoints + passing_at[v];
    return unread_at[v] < 0 ? frame.adjoints + adjoint_at[v] : frame.unread + unread_at[v];
  }

 private:
  // Relu over a value that nobody else reads takes its place.
  bool in_place(const Op& op) const {
    if (op.kind != OpKind::kRelu && !(op.kind == OpKind::kLeakyRelu && op.scalar[0] > 0)) return false;
    if (op.input[0] == 0 || op.input[0] == graph->output) return false;
    return readers[op.input[0]] == 1;
  }

  void find_border() {
    carried_at.assign(graph->values.size(), -1);
    for (size_t v = 1; v < border.size(); ++v)
      if (border[v]) {
        carried_at[v] = carried_size;
        carried_size += images * graph->values[v].pixels() * pad<T>(graph->values[v].channels);
      }
  }

  // Convolutions read an input without padding, and merge neighbouring pixels. A first one of few channels is made a
  // 1x1 convolution of patches, of the same weights.
  void lay_out_input(bool wants_input) {
    if (wants_input) return;
    const Op* only = nullptr;
    for (const Op& op : graph->ops) {
      if (op.input[0] != 0 && op.input[1] != 0) continue;
      if (op.kind != OpKind::kConv2d || narrow_matrix<T>(graph->parameters[op.param[0]])) return;
      only = &op;
    }
    Layout& input = values[0];
    input.stride = input.shape.channels;
    if (readers[0] != 1) return;
    const Shape& out = graph->values[only->output];
    const int taps = only->kernel.y * only->kernel.x, size = taps * input.shape.channels;
    if (taps == 1 || input.shape.channels >= Simd<T>::kWidth || size > out.channels) return;
    patches = only;
    input = {{size, out.height, out.width}, size};
  }

  void lay_out(bool wants_input) {
    const auto& ops_in = graph->ops;
    for (const Shape& shape : graph->values) values.push_back({shape, pad<T>(shape.channels)});
    lay_out_input(wants_input);
    input_size = pad<T>(images * values[0].sample());
    value_at.assign(values.size(), 0);
    int64_t constants = 0;
    for (const Op& op : ops_in) {
      OpPlan<T> plan;
      plan.op = op;
      plan.images = images;
      if (patches == &op) plan.op.kernel = plan.op.stride = plan.op.dilation = {}, plan.op.padding = {0, 0};
      for (int i = 0; i < 2; ++i)
        if (op.input[i] >= 0) plan.in[i] = values[op.input[i]];
      plan.out = values[op.output];
      plan.narrow = op.kind == OpKind::kConv2d && narrow_matrix<T>(graph->parameters[op.param[0]]);
      plan.moves = moves[op.input[0]];
      plan.wants_dx = plan.moves || reaches[op.input[0]];
      if (op.kind == OpKind::kBatchNorm && op.buffer[0] < 0 && plan.in_rows() < 2)
        throw std::invalid_argument("batch norm needs at least 2 values a channel (got 1 sample of 1 pixel)");
      functions.push_back(METAAUG_ISA::functions<T>(op));
      functions.back().plan(plan);
      const bool is_still = still[ops.size()];
      int64_t& size = is_still ? still_size : values_size;
      if (in_place(op)) {
        value_at[op.output] = value_at[op.input[0]];
      } else {
        value_at[op.output] = size;
        size += images * values[op.output].sample();
      }
      int64_t& saved = is_still ? still_size : saved_size;
      saved_at.push_back(saved);
      saved += pad<T>(plan.saved);
      saved_tangent_at.push_back(saved_tangent_size);
      saved_tangent_size += pad<T>(plan.saved_tangent);
      constants_at.push_back(constants);
      if (op.buffer[0] >= 0) constants += plan.saved;
      scratch_size = std::max(scratch_size, plan.scratch);
      ops.push_back(std::move(plan));
    }
  }

  void find_places_of_adjoints() {
    streamed.assign(values.size(), 0);
    over_value.assign(values.size(), 0);
    for (size_t i = 0; i + 1 < ops.size(); ++i) {
      const Op &conv = ops[i].op, &norm = ops[i + 1].op;
      const int v = conv.output;
      if (conv.kind != OpKind::kConv2d || norm.kind != OpKind::kBatchNorm || norm.input[0] != v) continue;
      if (readers[v] != 1 || v == graph->output || border[v]) continue;
      streamed[v] = !moves[conv.input[0]] && !outer[i].dx[0] && conv2d::takes_pictures(ops[i]);
      over_value[v] = !streamed[v] && !still_value[v];
    }
  }

  int64_t adjoint_size(int v) const { return v == 0 ? input_size : (streamed[v] ? 1 : images) * values[v].sample(); }

  // The adjoint behind a convolution whose input stays and wants none has done its part in the weight gradient: the
  // Hessian-vector product has the tangent of it alone.
  void lay_out_adjoints() {
    adjoint_at.assign(values.size(), 0);
    unread_at.assign(values.size(), -1);
    for (size_t i = 0; i < ops.size(); ++i) {
      const Op& op = ops[i].op;
      if (!moves[op.output] && op.output != graph->output) continue;  // a step asks for no adjoint of it
      bool unread = op.kind == OpKind::kConv2d && !moves[op.input[0]] && !outer[i].dx[0] && op.output != graph->output;
      for (const Op& reader : graph->ops) unread &= reader.input[0] != op.output || !in_place(reader);
      const int64_t size = adjoint_size(op.output);
      if (in_place(op)) {
        adjoint_at[op.output] = adjoint_at[op.input[0]];
      } else if (unread) {
        unread_at[op.output] = unread_size;
        unread_size += size;
      } else {
        adjoint_at[op.output] = adjoints_size;
        adjoints_size += size;
      }
    }
  }

  // An adjoint lives from the first reader of its value (backwards) to the op that made it.
  void lay_out_passing_adjoints() {
    struct Block {
      int64_t at, size;
    };
    std::vector<Block> live;
    passing_at.assign(values.size(), -1);
    const auto allocate = [&](int v) {
      passing_at[v] = 0;
      if (over_value[v]) return;
      int64_t at = 0;
      size_t place = 0;
      for (; place < live.size() && live[place].at < at + adjoint_size(v); ++place)
        at = live[place].at + live[place].size;
      live.insert(live.begin() + place, {at, adjoint_size(v)});
      passing_size = std::max(passing_size, at + adjoint_size(v));
      passing_at[v] = at;
    };
    allocate(graph->output);
    for (size_t i = ops.size(); i-- > 0;) {
      const Op& op = ops[i].op;
      if (passing_at[op.output] < 0) continue;
      const bool shared = in_place(op) && !border[op.output];
      if (shared) {
        passing_at[op.input[0]] = passing_at[op.output];
        continue;
      }
      for (int j = 0; j < 2; ++j)
        if ((inner[i].dx[j] || outer[i].dx[j]) && passing_at[op.input[j]] < 0) allocate(op.input[j]);
      if (over_value[op.output]) continue;
      const int64_t at = passing_at[op.output];
      live.erase(std::find_if(live.begin(), live.end(), [&](const Block& block) { return block.at == at; }));
    }
  }
};

}  // namespace metaaug::METAAUG_ISA
