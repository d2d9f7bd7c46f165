// What a kernel is given: a call's settings and pointers, the planned networks, and where each buffer of a task lies.
#pragma once

#include <limits>

#include "../call.h"
#include "../loss.h"
#include "block.h"
#include "engine.h"
#include "program.h"

namespace metaaug::cuda {

// Where each buffer of a task begins, in elements; -1: nowhere. Either all are in shared memory or all in the
// workspace, and then products go through tiles at the start of shared memory.
struct Regions {
  bool in_workspace = false;
  int64_t partials = -1;    // of tiles that several blocks share
  int64_t sums = -1;        // of sum_all, twice
  int64_t path = -1;        // theta_0, and theta_k after each step, or in turns
  int64_t path_stride = 0;  // so that each of them can be read 16 bytes at a time
  int64_t gradient = -1;    // of a step, as far as it is not used where it is found; then the adjoint
  int64_t tangent = -1;     // the direction of a Hessian-vector product
  int64_t directions = -1;  // m_k of all steps or the last; Adam's first moment
  int64_t second = -1;      // Adam's second moment
  int64_t carry = -1;       // momentum's adjoint
  int64_t input = -1, still = -1, carried = -1;
  int64_t slots = -1;     // frames of the kept steps, one behind the other
  int64_t tangents = -1;  // the tangent's frame; at other times the query's
  int64_t slot = 0;       // elements of one frame
  int slots_kept = 0;
};

// The first thing that was not finite in a task, as a word, of which the least is the first task's.
struct Failure {
  enum What { kLoss, kQueryLoss, kWeight, kMetaGradient };
  static constexpr unsigned long long kNone = ~0ULL;
  static constexpr int kMostSteps = (1 << 28) - 1;

  METAAUG_HD static unsigned long long word(int task, int step, What what, double value) {
    const unsigned sign = value != value ? 0 : value > 0 ? 1 : 2;
    return (unsigned long long)(task) << 32 | unsigned(step) << 4 | unsigned(what) << 2 | sign;
  }

  static NonFinite read(unsigned long long word) {
    static const char* const kNames[] = {"loss", "loss", "an adapted weight", "the meta-gradient"};
    using Double = std::numeric_limits<double>;
    static const double kValues[] = {Double::quiet_NaN(), Double::infinity(), -Double::infinity()};
    const unsigned low = unsigned(word), what = low >> 2 & 3;
    return {int(word >> 32), int(low >> 4), what == kQueryLoss, kNames[what], kValues[low & 3]};
  }
};

template <class T>
struct Arguments {
  Program support, query;
  bool has_support, has_query, reverse, keep_path, keep_directions, remembers;
  int tasks, first_task, all_tasks;

  // As in Call.
  int steps, first_step;
  LossKind loss;
  OptimizerKind optimizer;
  Precision precision;
  bool first_order;
  double label_smoothing, momentum, weight_decay, beta1, beta2, eps;
  uint32_t seed;

  // Of each parameter: the user's tensor, its place in theta, and its rate.
  int parameters;
  int64_t flat;                      // parameters' elements
  int64_t rates;                     // rates' elements
  int offset[kMostParameters + 1];   // in theta
  int rate_offset[kMostParameters];  // in the gradient of all rates
  const T* parameter[kMostParameters];
  const T* rate[kMostParameters];
  unsigned char rate_form[kMostParameters];  // of the flags below
  const T* frozen[2 * kMostFrozen];

  const T *support_x, *support_y, *support_weight, *initial, *query_x, *query_y;
  const int64_t *support_ids, *rows, *query_ids;
  int supports, queries, batch;
  const T *step_weights, *task_weights, *flat_adjoint, *prediction_adjoint;
  T *out_flat, *task_losses, *step_losses, *accuracy, *predictions, *statistics, *grad_initial;
  T *losses_by_step, *accuracy_by_step;
  T *grad_support_x, *grad_support_y, *grad_support_weight, *grad_query_x, *grad_query_y;
  T* rows_out;       // [tasks, sums]: what is summed over tasks, a row each
  int64_t row_size;  // its elements: of parameters or displacements, then of rates
  bool sums_gradient, sums_displacement, sums_rates;
  int64_t norm_channels;

  Regions regions;
  T* workspace;
  int64_t workspace_size;       // elements of a team
  TeamState* team_states;       // [teams], zero
  unsigned long long* failure;  // of the call
  volatile int* failed;         // set if there is one

  METAAUG_DEVICE int size(int p) const { return offset[p + 1] - offset[p]; }
  METAAUG_DEVICE bool by_step() const { return losses_by_step || accuracy_by_step; }
};

inline constexpr unsigned char kPerStep = 1, kPerElement = 2;
inline constexpr unsigned char kUpdatedByOp = 4;  // a step of the parameter is made where its gradient is found

static_assert(sizeof(Arguments<double>) <= 4096, "beyond what a kernel may be given");

}  // namespace metaaug::cuda
