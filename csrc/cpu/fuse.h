// Draws the relu and the 2x2 max pool behind a batch norm into it: the pictures between them are then never stored.
// Finds the biases in front of batch norms, whose gradient is zero: a norm takes away what all its samples share.
#pragma once

#include "../graph.h"

namespace metaaug::METAAUG_ISA {

inline Graph fuse(Graph graph) {
  const std::vector<int> readers = graph.readers();
  const auto follows = [&](const Op& op, const Op& norm) {
    return op.input[0] == norm.output && readers[norm.output] == 1 && norm.output != graph.output;
  };
  const auto is = [](Pair pair, int value) { return pair.y == value && pair.x == value; };
  const auto halves = [&](const Op& op) {
    return op.kind == OpKind::kMaxPool && is(op.kernel, 2) && is(op.stride, 2) && is(op.padding, 0) &&
           is(op.dilation, 1);
  };
  std::vector<Op> ops;
  for (const Op& op : graph.ops) {
    Op* last = ops.empty() || ops.back().kind != OpKind::kBatchNorm ? nullptr : &ops.back();
    if (last && follows(op, *last) && !last->relu && op.kind == OpKind::kRelu) {
      last->relu = true;
      last->output = op.output;
    } else if (last && follows(op, *last) && last->relu && !last->pool && halves(op)) {
      last->pool = true;
      last->output = op.output;
    } else {
      ops.push_back(op);
    }
  }
  for (size_t i = 1; i < ops.size(); ++i) {
    Op &conv = ops[i - 1], &norm = ops[i];
    conv.idle_bias = conv.kind == OpKind::kConv2d && norm.kind == OpKind::kBatchNorm && norm.buffer[0] < 0 &&
                     norm.input[0] == conv.output && readers[conv.output] == 1 && conv.output != graph.output;
  }
  graph.ops = std::move(ops);
  return graph;
}

}  // namespace metaaug::METAAUG_ISA
