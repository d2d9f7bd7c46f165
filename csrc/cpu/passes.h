// The four passes over a network: forward, backward, and the tangents of both.
#pragma once

#include "network.h"
#include "packing.h"

namespace metaaug::METAAUG_ISA {

template <class T>
struct Passes {
  const Network<T>& net;
  const Packing<T>& packing;
  const T* constants;  // frozen mean, r, variance of each batch norm that has them, in order of ops
  T* scratch;

  // Which pass this is: the row of per-step parameters, and the key of dropout masks.
  struct Pass {
    int row = 0;
    uint32_t seed = 0, task = 0, index = 0;
  };

  // `again`: not for the first time on this task, so that still ops are done.
  void forward(const Frame<T>& frame, const T* theta, const Pass& pass, bool again = false) const {
    const T* constant = constants;
    for (size_t i = 0; i < net.ops.size(); ++i) {
      OpCall<T> call = bind(i, frame, theta, pass);
      if (call.plan.op.buffer[0] >= 0) {
        const int64_t size = 3 * call.plan.out.stride;
        std::copy(constant, constant + size, call.saved);
        constant += size;
      }
      if (!again || !net.still[i]) net.functions[i].forward(call);
    }
  }

  // Adjoints of the values in `wants` from the output's, which the caller has written; `grad` is added to.
  void backward(const Frame<T>& frame, const T* theta, const Pass& pass, const std::vector<Wants>& wants,
                T* grad) const {
    for (size_t i = net.ops.size(); i-- > 0;) {
      if (wants[i].active && !net.streamed[net.ops[i].op.output]) adjoint(i, frame, frame, theta, pass, wants, grad);
    }
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
  // One op's backward, linear in the adjoints that `adjoints` holds; values come from `frame`.
  void adjoint(size_t i, const Frame<T>& frame, const Frame<T>& adjoints, const T* theta, const Pass& pass,
               const std::vector<Wants>& wants, T* grad) const {
    OpCall<T> call = bind(i, frame, theta, pass);
    call.dy = net.adjoint(adjoints, call.plan.op.output);
    bind_wants(call, wants[i], adjoints, grad, pass, call.dx, call.dp);
    with_reader(call, i, frame, adjoints, theta, pass, wants, grad, net.functions[i].backward);
  }

  // Runs a backward, together with that of the convolution in front which takes its adjoint picture by picture.
  void with_reader(OpCall<T>& call, size_t i, const Frame<T>& frame, const Frame<T>& adjoints, const T* theta,
                   const Pass& pass, const std::vector<Wants>& wants, T* grad, void (*run)(const OpCall<T>&)) const {
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
