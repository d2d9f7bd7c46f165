#include "fuse.h"

#include <utility>

namespace metaaug {

Graph fuse(Graph graph, bool with_products) {
  const std::vector<int> readers = graph.readers();
  const auto alone = [&](int value) { return readers[value] == 1 && value != graph.output; };
  const auto is = [](Pair pair, int value) { return pair.y == value && pair.x == value; };
  const auto halves = [&](const Op& op) {
    return op.kind == OpKind::kMaxPool && is(op.kernel, 2) && is(op.stride, 2) && is(op.padding, 0) &&
           is(op.dilation, 1);
  };
  std::vector<Op> ops;
  for (const Op& op : graph.ops) {
    Op* last = ops.empty() || op.input[0] != ops.back().output || !alone(ops.back().output) ? nullptr : &ops.back();
    const bool after_norm = last && last->kind == OpKind::kBatchNorm;
    // An output's adjoint comes from the loss, which knows nothing of a product's relu.
    const bool after_product = last && last->kind == OpKind::kConv2d && with_products && op.output != graph.output;
    if (op.kind == OpKind::kRelu && (after_norm || after_product) && !last->relu) {
      last->relu = true;
      last->output = op.output;
    } else if (after_norm && last->relu && !last->pool && halves(op)) {
      last->pool = true;
      last->output = op.output;
    } else {
      ops.push_back(op);
    }
  }
  for (size_t i = 1; i < ops.size(); ++i) {
    Op &conv = ops[i - 1], &norm = ops[i];
    conv.idle_bias = conv.kind == OpKind::kConv2d && !conv.relu && norm.kind == OpKind::kBatchNorm &&
                     norm.buffer[0] < 0 && norm.input[0] == conv.output && alone(conv.output);
  }
  graph.ops = std::move(ops);
  return graph;
}

}  // namespace metaaug
