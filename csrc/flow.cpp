#include "flow.h"

namespace metaaug {

Flow::Flow(const Graph& graph, const std::vector<char>& adapted, const std::vector<char>& wanted, bool wants_input,
           bool repeats)
    : readers(graph.readers()), adapted(adapted), moves(graph.values.size(), 0), reaches(graph.values.size(), 0) {
  reaches[0] = wants_input;
  for (const Op& op : graph.ops) {
    for (int i = 0; i < 2; ++i) {
      if (op.input[i] >= 0) moves[op.output] |= moves[op.input[i]], reaches[op.output] |= reaches[op.input[i]];
      if (op.param[i] >= 0) moves[op.output] |= adapted[op.param[i]], reaches[op.output] |= wanted[op.param[i]];
    }
  }
  find_still(graph, repeats && !wants_input);
  inner = wants(graph, moves, adapted);
  outer = wants(graph, reaches, wanted);
}

void Flow::find_still(const Graph& graph, bool repeats) {
  still.assign(graph.ops.size(), 0);
  still_value.assign(graph.values.size(), 0);
  border.assign(graph.values.size(), 0);
  still_value[0] = repeats;
  for (size_t i = 0; i < graph.ops.size(); ++i) {
    const Op& op = graph.ops[i];
    bool same = !moves[op.output] && op.kind != OpKind::kDropout && op.output != graph.output;
    for (int j = 0; j < 2; ++j) {
      if (op.input[j] >= 0) same &= still_value[op.input[j]];
      if (op.param[j] >= 0) same &= graph.parameters[op.param[j]].rows == 1;
    }
    still[i] = still_value[op.output] = same;
  }
  for (size_t i = 0; i < graph.ops.size(); ++i)
    for (int input : graph.ops[i].input)
      if (input > 0 && !still[i]) border[input] = still_value[input];
}

std::vector<Wants> Flow::wants(const Graph& graph, const std::vector<char>& values,
                               const std::vector<char>& params) const {
  std::vector<Wants> result(graph.ops.size());
  std::vector<char> written = border;
  for (size_t i = graph.ops.size(); i-- > 0;) {
    const Op& op = graph.ops[i];
    Wants& w = result[i];
    w.active = values[op.output];
    for (int j = 0; w.active && j < 2; ++j) {
      w.dp[j] = op.param[j] >= 0 && params[op.param[j]] && !(j == 1 && op.idle_bias);
      if (op.input[j] < 0 || !values[op.input[j]]) continue;
      w.dx[j] = true;
      w.accumulate[j] = written[op.input[j]];
      written[op.input[j]] = 1;
    }
  }
  return result;
}

}  // namespace metaaug
