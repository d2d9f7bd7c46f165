// The four passes over a network: forward, backward, and the tangents of both.
#pragma once

#include "network.h"
#include "packing.h"

namespace metaaug::METAAUG_ISA {

// Mean, r and variance of each batch norm that has them frozen, in order of ops.
template <class T>
std::vector<T> pack_constants(const Graph& graph, const std::vector<const T*>& buffers) {
  std::vector<T> packed;
  for (const Op& op : graph.ops) {
    if (op.kind != OpKind::kBatchNorm || op.buffer[0] < 0) continue;
    const int channels = graph.values[op.output].channels;
    const int64_t stride = pad<T>(channels), at = int64_t(packed.size());
    packed.resize(at + 3 * stride, T(0));
    for (int c = 0; c < channels; ++c) {
      const T variance = buffers[op.buffer[1]][c];
      packed[at + c] = buffers[op.buffer[0]][c];
      packed[at + stride + c] = T(1) / std::sqrt(variance + T(op.eps));
      packed[at + 2 * stride + c] = variance;
    }
  }
  return packed;
}

template <class T>
struct Passes {
  const Network<T>& net;
  const Packing<T>& packing;
  const T* constants;  // see pack_constants
  T* scratch;

  // Which pass this is: the row of per-step parameters, and the key of dropout masks.
  struct Pass {
    int row = 0;
    uint32_t seed = 0, task = 0, index = 0;
  };

  // Ops of a pass, `last` excluded.
  struct Range {
    size_t first, last;
  };
  Range all() const { return {0, net.ops.size()}; }

  // `again`: not for the first time on this task, so that still ops are done.
  void forward(const Frame<T>& frame, const T* theta, const Pass& pass, bool again = false) const {
    for (size_t i = 0; i < net.ops.size(); ++i)
      if (!again || !net.still[i]) forward(i, frame, theta, pass);
  }
  void forward(const Frame<T>& frame, const T* theta, const Range& range) const {
    for (size_t i = range.first; i < range.last; ++i) forward(i, frame, theta, {});
  }

  // Adjoints of the values in `wants` from the output's, which the caller has written; `grad` is added to.
  void backward(const Frame<T>& frame, const T* theta, const Pass& pass, const std::vector<Wants>& wants,
                T* grad) const {
    backward(frame, theta, pass, wants, grad, all());
  }
  void backward(const Frame<T>& frame, const T* theta, const Pass& pass, const std::vector<Wants>& wants, T* grad,
                const Range& range) const {
    for (size_t i = range.last; i-- > range.first;) {
      if (wants[i].active && !net.streamed[net.ops[i].op.output]) adjoint(i, frame, frame, theta, pass, wants, grad);
    }
  }

  // A batch norm's second half backwards; see NormFunctions.
  void spread(size_t i, const Frame<T>& frame, const T* theta, T* grad, const T* sums, T share) const {
    OpCall<T> call = backward_call(i, frame, theta);
    if (!net.outer[i].dx[0]) return;
    call.dx[0] = net.adjoint(frame, call.plan.op.input[0]);
    call.accumulate[0] = net.outer[i].accumulate[0];
    with_reader(call, i, frame, frame, theta, {}, net.outer, grad,
                [&](const OpCall<T>& it) { norm_functions<T>(it.plan.op).spread(it, sums, share); });
  }

  OpCall<T> forward_call(size_t i, const Frame<T>& frame, const T* theta) const { return bind(i, frame, theta, {}); }
  OpCall<T> backward_call(size_t i, const Frame<T>& frame, const T* theta) const {
    OpCall<T> call = bind(i, frame, theta, {});
    call.dy = net.adjoint(frame, call.plan.op.output);
    return call;
  }

  // Tangents of all values that move, for the parameter tangents `theta_t`.
  void tangent(const Frame<T>& frame, const Frame<T>& tangents, const T* theta, const T* theta_t,
               const Pass& pass) const {
    for (size_t i = 0; i < net.ops.size(); ++i) {
      OpCall<T> call = bind(i, frame, theta, pass);
      bind_tangents(call, i, tangents, theta_t, pass);
      if (!call.moves()) continue;
      call.y_t = net.value(tangents, call.plan.op.output);
      net.functions[i].tangent(call);
    }
  }

  // The tangent of `backward` towards all wanted parameters, from the tangent of the output's adjoint. At still ops it
  // stops.
  void tangent_backward(const Frame<T>& frame, const Frame<T>& tangents, const T* theta, const T* theta_t,
                        const Pass& pass, T* grad_t) const {
    for (size_t i = net.ops.size(); i-- > 0;) {
      if (!net.outer[i].active || net.still[i] || net.streamed[net.ops[i].op.output]) continue;
      OpCall<T> call = bind(i, frame, theta, pass);
      bind_tangents(call, i, tangents, theta_t, pass);
      if (!call.moves()) {
        adjoint(i, frame, tangents, theta, pass, net.outer, grad_t);
        continue;
      }
      call.dy = net.adjoint(frame, call.plan.op.output);
      call.dy_t = net.adjoint(tangents, call.plan.op.output);
      bind_wants(call, net.outer[i], tangents, grad_t, pass, call.dx_t, call.dp_t);
      with_reader(call, i, frame, tangents, theta, pass, net.outer, grad_t, net.functions[i].tangent_backward);
    }
  }

  // Goes on from there, once for all steps: nothing moves, so this is linear in the carried adjoints.
  void still_backward(const Frame<T>& frame, const Frame<T>& tangents, const T* theta, T* grad) const {
    for (size_t i = net.ops.size(); i-- > 0;) {
      if (net.outer[i].active && net.still[i] && !net.streamed[net.ops[i].op.output])
        adjoint(i, frame, tangents, theta, {}, net.outer, grad);
    }
  }

 private:
  void forward(size_t i, const Frame<T>& frame, const T* theta, const Pass& pass) const {
    OpCall<T> call = bind(i, frame, theta, pass);
    if (call.plan.op.buffer[0] >= 0) {
      const T* constant = constants + net.constants_at[i];
      std::copy(constant, constant + call.plan.saved, call.saved);
    }
    net.functions[i].forward(call);
  }

  // One op's backward, linear in the adjoints that `adjoints` holds; values come from `frame`.
  void adjoint(size_t i, const Frame<T>& frame, const Frame<T>& adjoints, const T* theta, const Pass& pass,
               const std::vector<Wants>& wants, T* grad) const {
    OpCall<T> call = bind(i, frame, theta, pass);
    call.dy = net.adjoint(adjoints, call.plan.op.output);
    bind_wants(call, wants[i], adjoints, grad, pass, call.dx, call.dp);
    with_reader(call, i, frame, adjoints, theta, pass, wants, grad, net.functions[i].backward);
  }

  // Runs a backward, together with that of the convolution in front which takes its adjoint picture by picture.
  template <class Run>
  void with_reader(OpCall<T>& call, size_t i, const Frame<T>& frame, const Frame<T>& adjoints, const T* theta,
                   const Pass& pass, const std::vector<Wants>& wants, T* grad, const Run& run) const {
    if (!net.streamed[call.plan.op.input[0]]) return run(call);
    OpCall<T> reader = bind(i - 1, frame, theta, pass);
    reader.dy = net.adjoint(adjoints, reader.plan.op.output);
    bind_wants(reader, wants[i - 1], adjoints, grad, pass, reader.dx, reader.dp);
    call.reader = &reader;
    run(call);
  }

  int64_t parameter_at(int p, const Pass& pass) const {
    const int rows = net.graph->parameters[p].rows;
    return packing.offset(p) + (rows > 1 ? std::min(pass.row, rows - 1) * packing.row(p) : 0);
  }

  OpCall<T> bind(size_t i, const Frame<T>& frame, const T* theta, const Pass& pass) const {
    const OpPlan<T>& plan = net.ops[i];
    OpCall<T> call(plan);
    for (int j = 0; j < 2; ++j) {
      if (plan.op.input[j] >= 0) call.x[j] = net.value(frame, plan.op.input[j]);
      if (plan.op.param[j] >= 0) call.p[j] = theta + parameter_at(plan.op.param[j], pass);
    }
    call.y = net.value(frame, plan.op.output);
    call.saved = net.saved(frame, i);
    call.scratch = scratch;
    if (plan.op.kind == OpKind::kDropout) call.key = dropout_key(pass.seed, pass.task, pass.index, plan.op.site);
    return call;
  }

  void bind_tangents(OpCall<T>& call, size_t i, const Frame<T>& tangents, const T* theta_t, const Pass& pass) const {
    const Op& op = call.plan.op;
    for (int j = 0; j < 2; ++j) {
      if (op.input[j] >= 0 && net.moves[op.input[j]]) call.x_t[j] = net.value(tangents, op.input[j]);
      if (op.param[j] >= 0 && net.adapted[op.param[j]]) call.p_t[j] = theta_t + parameter_at(op.param[j], pass);
    }
    call.saved_tangent = tangents.saved + net.saved_tangent_at[i];
  }

  void bind_wants(OpCall<T>& call, const Wants& wants, const Frame<T>& frame, T* grad, const Pass& pass, T* (&dx)[2],
                  T* (&dp)[2]) const {
    const Op& op = call.plan.op;
    for (int j = 0; j < 2; ++j) {
      if (wants.dx[j]) dx[j] = net.adjoint(frame, op.input[j]);
      if (wants.dp[j] && grad) dp[j] = grad + parameter_at(op.param[j], pass);
      call.accumulate[j] = wants.accumulate[j];
    }
  }
};

}  // namespace metaaug::METAAUG_ISA
