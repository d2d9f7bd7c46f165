// What depends on what in a graph: which values move with the weights that adapt, whose adjoints each pass computes.
#pragma once

#include <vector>

#include "graph.h"

namespace metaaug {

// What a backward pass computes at one op.
struct Wants {
  bool active = false, dx[2] = {false, false}, accumulate[2] = {false, false}, dp[2] = {false, false};
};

struct Flow {
  std::vector<int> readers;
  std::vector<char> adapted;  // parameters that move in the inner loop
  std::vector<char> moves;    // values that depend on one of them
  std::vector<char> reaches;  // values whose adjoint is wanted by a parameter or the input
  // Ops in front of everything that adapts (ANIL's body), where all steps of a task see the same samples: their values
  // and what they save are computed once, and adjoints that leave the others for them are summed over steps.
  std::vector<char> still;
  std::vector<char> still_value, border;  // written by a still op; and read by another
  std::vector<Wants> inner, outer;        // towards adapted parameters; towards all wanted ones, and maybe the input

  // `adapted` and `wanted` have an entry for each parameter; `repeats`: all steps see the same samples.
  Flow(const Graph& graph, const std::vector<char>& adapted, const std::vector<char>& wanted, bool wants_input,
       bool repeats);

 private:
  void find_still(const Graph& graph, bool repeats);
  std::vector<Wants> wants(const Graph& graph, const std::vector<char>& values, const std::vector<char>& params) const;
};

}  // namespace metaaug
