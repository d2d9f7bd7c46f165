// Where torch meets the engine: validate, allocate, route to a device, release the GIL.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <optional>

#include "cpu/engine.h"

namespace metaaug {

using OptionalTensor = std::optional<at::Tensor>;

// Tensors of one call, as in Call; `y` is int64 class ids or floating-point targets.
struct Inputs {
  std::vector<at::Tensor> parameters;  // one for each of the graph's; empty with `initial`
  std::vector<at::Tensor> buffers;
  std::vector<OptionalTensor> rates;  // one for each parameter, null where it does not move
  std::vector<bool> per_step, wanted;
  OptionalTensor support_x, support_y, support_weight, rows, initial;
  OptionalTensor query_x, query_y, step_weights, task_weights;
  OptionalTensor flat_adjoint, prediction_adjoint;
};

class FusedEngine {
 public:
  explicit FusedEngine(Graph graph) : graph_(std::move(graph)) { cpu::check(graph_); }

  // Computes the outputs named in `outputs`: those of Call, and `loss`, the mean of `task_losses`. `poll` is
  // called between tasks on the calling thread; true stops the run.
  std::map<std::string, at::Tensor> run(const Settings& settings, const Inputs& inputs,
                                        const std::vector<std::string>& outputs, const std::function<bool()>& poll);

 private:
  template <class T>
  cpu::Engine<T>& engine();
  template <class T>
  std::map<std::string, at::Tensor> run_cpu(const Settings& settings, const Inputs& inputs,
                                            const std::vector<std::string>& outputs, const std::function<bool()>& poll);

  Graph graph_;
  std::unique_ptr<cpu::Engine<float>> float_;
  std::unique_ptr<cpu::Engine<double>> double_;
};

// Thrown when NaN or infinity arises; bindings turn it into metaaug_fast.NonFiniteError.
struct NonFiniteError {
  std::string message;
};

}  // namespace metaaug
