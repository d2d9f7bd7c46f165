// What an executor is asked to do: plain structs and pointers, no torch. Tensors are contiguous and in torch's layout.
#pragma once

#include <cstdint>
#include <vector>

#include "graph.h"

namespace metaaug {

struct Settings {
  int steps = 0;
  int first_step = 0;  // how many steps lie behind theta_0, for weights that are only judged
  LossKind loss = LossKind::kCrossEntropy;
  OptimizerKind optimizer = OptimizerKind::kSgd;
  Precision precision = Precision::kFloat32;
  bool first_order = false;
  double label_smoothing = 0, momentum = 0, weight_decay = 0;
  double beta1 = 0, beta2 = 0.999, eps = 1e-8;
  uint32_t seed = 0;
};

// T tasks of `count` samples each. A target is a class id or `values`; both null: predictions only.
template <class T>
struct Samples {
  int count = 0;
  const T* x = nullptr;           // [T, count, C, H, W]
  const int64_t* ids = nullptr;   // [T, count]
  const T* values = nullptr;      // [T, count, outputs]
  const T* weight = nullptr;      // [T, count]
  const int64_t* rows = nullptr;  // [T, K, batch]: what step k sees
  int batch = 0;
};

// Step sizes of one parameter: [steps or 1] times [size or 1]; null data: the parameter does not move.
template <class T>
struct Rate {
  const T* data = nullptr;
  bool per_step = false, per_element = false;
};

// One call: adapt T tasks, judge them, and go back. Null outputs are not computed. "flat" is all parameters in
// their order, P values.
template <class T>
struct Call {
  Settings settings;
  int tasks = 0;
  std::vector<const T*> parameters;  // theta_0, shared by the tasks
  const T* initial = nullptr;        // [T, P]: theta_0 of each task instead
  std::vector<const T*> buffers;     // [C] each: frozen batch-norm means and variances
  std::vector<Rate<T>> rates;        // one for each parameter
  std::vector<char> wanted;          // parameters whose gradient is wanted
  Samples<T> support, query;
  const T* step_weights = nullptr;        // [K]: weight of the query loss after each step; null: the last alone
  const T* task_weights = nullptr;        // [T]: dL/d(task loss); null: 1 / T
  const T* flat_adjoint = nullptr;        // [T, P]: dL/dtheta_K, instead of a query
  const T* prediction_adjoint = nullptr;  // [T, Q, outputs]: dL/dprediction, instead of a query loss

  T* flat = nullptr;               // [T, P]: theta_K
  T* mean_displacement = nullptr;  // [P]: mean over tasks of theta_K - theta_0
  T* task_losses = nullptr;        // [T]
  T* step_losses = nullptr;        // [T, K]: the query loss after each step
  T* accuracy = nullptr;           // [T]
  T* losses_by_step = nullptr;     // [T, K + 1]: the query loss after 0, 1, ... K steps; forward only, unweighted
  T* accuracy_by_step = nullptr;   // [T, K + 1], likewise
  T* predictions = nullptr;        // [T, Q, outputs]
  T* statistics = nullptr;         // [T, 2 sum C]: batch mean and unbiased variance of the last query pass
  T* grad_parameters = nullptr;    // [P], summed over tasks
  T* grad_initial = nullptr;       // [T, P]
  T* grad_rates = nullptr;         // the rates' values in order of parameters, summed over tasks
  T* grad_support_x = nullptr;     // as support.x; added to, like the four below: pass zeros
  T* grad_support_y = nullptr;
  T* grad_support_weight = nullptr;
  T* grad_query_x = nullptr;
  T* grad_query_y = nullptr;

  bool reverse() const {
    return grad_parameters || grad_initial || grad_rates || grad_support_x || grad_support_y || grad_support_weight ||
           grad_query_x || grad_query_y;
  }
  bool by_step() const { return losses_by_step || accuracy_by_step; }
};

// N samples through theta_0, or back. Null outputs are not computed.
template <class T>
struct Encoding {
  int samples = 0;
  const T* x = nullptr;  // [N, C, H, W]
  std::vector<const T*> parameters, buffers;
  std::vector<char> wanted;    // parameters whose gradient is wanted, in this call or in that of the way back
  bool wants_x = false;        // likewise
  const T* adjoint = nullptr;  // [N, outputs]: dL/doutput, and so the way back
  uint64_t number = 0;         // names a way forward whose activations are to be kept for the way back, which
                               // computes them again where another call has come between; 0: none

  T* output = nullptr;           // [N, outputs]
  T* statistics = nullptr;       // [2 sum C]: batch mean and unbiased variance of every batch norm, in order of ops
  T* grad_parameters = nullptr;  // [P]
  T* grad_x = nullptr;           // as x; added to: pass zeros
};

// The first task in which NaN or infinity arose, if any, and at which step (or query pass after so many steps).
struct NonFinite {
  int task = -1, step = 0;
  bool query = false;
  const char* what = "";
  double value = 0;
  bool earlier = false;  // of a call before this one, which was not waited for
};

// How much of the steps' activations to keep for the reverse sweep, over all tasks at work; at least one step's are
// kept. On a GPU also how much of single tasks' gradients to keep until they are summed. 256 MiB, or what
// METAAUG_KEEP_MIB asks for.
int64_t kept_bytes();

}  // namespace metaaug
