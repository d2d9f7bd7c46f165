// The four passes over a network by one team: forward, backward, and the tangents of both.
#pragma once

#include "ops/table.h"

namespace metaaug::cuda {

// Buffers of one pass; as in cpu/network.h.
template <class T>
struct Frame {
  T *input = nullptr, *values = nullptr, *adjoints = nullptr, *saved = nullptr;
  T *still = nullptr, *carried = nullptr;  // see Flow::still
};

// Which pass this is: the row of per-step parameters, and the key of dropout masks.
struct Pass {
  int row = 0;
  uint32_t seed = 0, task = 0, index = 0;
};

template <class T>
struct Passes {
  const Program& net;
  const T* const* frozen;  // mean and variance of each batch norm that has them
  TileRoom<T> tiles;

  // `again`: not for the first time on this task, so that still ops are done.
  METAAUG_DEVICE METAAUG_NOINLINE void forward(const Frame<T>& frame, const T* theta, const Pass& pass,
                                               bool again = false) const {
    for (int i = 0; i < net.count; ++i) {
      if (again && net.nodes[i].still) continue;
      run_op(Role::kForward, bind(i, frame, theta, pass));
      sync();
    }
  }

  // Adjoints of all wanted values from the output's, which the caller has written; `grad` is added to.
  METAAUG_DEVICE METAAUG_NOINLINE void backward(const Frame<T>& frame, const T* theta, const Pass& pass,
                                                T* grad) const {
    for (int i = net.count; i-- > 0;)
      if (net.nodes[i].outer.active) adjoint(i, frame, frame, theta, pass, net.nodes[i].outer, grad, nullptr);
  }

  // The same towards parameters that adapt; without `grad`, of values alone. Gradients go to `update` where they can.
  METAAUG_DEVICE METAAUG_NOINLINE void step_backward(const Frame<T>& frame, const T* theta, const Pass& pass, T* grad,
                                                     const Update<T>* update) const {
    for (int i = net.count; i-- > 0;)
      if (net.nodes[i].inner.active) adjoint(i, frame, frame, theta, pass, net.nodes[i].inner, grad, update);
  }

  // Tangents of all values that move, for the parameter tangents `theta_t`.
  METAAUG_DEVICE METAAUG_NOINLINE void tangent(const Frame<T>& frame, const Frame<T>& tangents, const T* theta,
                                               const T* theta_t, const Pass& pass) const {
    for (int i = 0; i < net.count; ++i) {
      OpCall<T> call = bind(i, frame, theta, pass);
      bind_tangents(call, i, tangents, theta_t, pass);
      if (!call.moves()) continue;
      call.y_t = tangents.values + net.places[call.node->op.output].value;
      run_op(Role::kTangent, call);
      sync();
    }
  }

  // The tangent of `backward` towards all wanted parameters, from the tangent of the output's adjoint. At still ops it
  // stops.
  METAAUG_DEVICE METAAUG_NOINLINE void tangent_backward(const Frame<T>& frame, const Frame<T>& tangents, const T* theta,
                                                        const T* theta_t, const Pass& pass, T* grad_t) const {
    for (int i = net.count; i-- > 0;) {
      const Node& node = net.nodes[i];
      if (!node.outer.active || node.still) continue;
      OpCall<T> call = bind(i, frame, theta, pass);
      bind_tangents(call, i, tangents, theta_t, pass);
      if (!call.moves()) {
        adjoint(i, frame, tangents, theta, pass, node.outer, grad_t, nullptr);
        continue;
      }
      call.dy = adjoint_of(frame, node.op.output);
      call.dy_t = adjoint_of(tangents, node.op.output);
      bind_wants(call, node.outer, tangents, grad_t, pass, call.dx_t, call.dp_t);
      run_op(Role::kTangentBackward, call);
      sync();
    }
  }

  // Goes on from there, once for all steps: nothing moves, so this is linear in the carried adjoints.
  METAAUG_DEVICE METAAUG_NOINLINE void still_backward(const Frame<T>& frame, const Frame<T>& tangents, const T* theta,
                                                      T* grad) const {
    for (int i = net.count; i-- > 0;)
      if (net.nodes[i].outer.active && net.nodes[i].still)
        adjoint(i, frame, tangents, theta, {}, net.nodes[i].outer, grad, nullptr);
  }

  METAAUG_DEVICE T* value_of(const Frame<T>& frame, int v) const {
    if (v == 0) return frame.input;
    return (net.places[v].still ? frame.still : frame.values) + net.places[v].value;
  }
  METAAUG_DEVICE T* adjoint_of(const Frame<T>& frame, int v) const {
    return (net.places[v].border ? frame.carried : frame.adjoints) + net.places[v].adjoint;
  }

 private:
  // One op's backward, linear in the adjoints that `adjoints` holds; values come from `frame`.
  METAAUG_DEVICE void adjoint(int i, const Frame<T>& frame, const Frame<T>& adjoints, const T* theta, const Pass& pass,
                              const Wants& wants, T* grad, const Update<T>* update) const {
    OpCall<T> call = bind(i, frame, theta, pass);
    call.dy = adjoint_of(adjoints, call.node->op.output);
    for (int j = 0; j < 2; ++j)
      if (update && call.node->updates[j]) call.step[j] = ParameterStep<T>(*update, call.node->op.param[j]);
    bind_wants(call, wants, adjoints, grad, pass, call.dx, call.dp);
    run_op(Role::kBackward, call);
    sync();
  }

  METAAUG_DEVICE static int64_t parameter_at(const Node& node, int j, const Pass& pass) {
    const int last = node.rows[j] - 1;
    return node.param[j] + int64_t{pass.row < last ? pass.row : last} * node.row[j];
  }

  METAAUG_DEVICE OpCall<T> bind(int i, const Frame<T>& frame, const T* theta, const Pass& pass) const {
    const Node& node = net.nodes[i];
    OpCall<T> call;
    call.node = &node;
    call.images = net.images;
    call.tiles = tiles;
    for (int j = 0; j < 2; ++j) {
      if (node.op.input[j] >= 0) call.x[j] = value_of(frame, node.op.input[j]);
      if (node.op.param[j] >= 0) call.p[j] = theta + parameter_at(node, j, pass);
      if (node.op.buffer[j] >= 0) call.frozen[j] = frozen[node.op.buffer[j]];
    }
    call.y = value_of(frame, node.op.output);
    call.saved = (node.still ? frame.still : frame.saved) + node.saved;
    if (node.op.kind == OpKind::kDropout) call.key = dropout_key(pass.seed, pass.task, pass.index, node.op.site);
    return call;
  }

  METAAUG_DEVICE void bind_tangents(OpCall<T>& call, int i, const Frame<T>& tangents, const T* theta_t,
                                    const Pass& pass) const {
    const Node& node = net.nodes[i];
    for (int j = 0; j < 2; ++j) {
      if (node.moves[j]) call.x_t[j] = tangents.values + net.places[node.op.input[j]].value;
      if (node.adapted[j]) call.p_t[j] = theta_t + parameter_at(node, j, pass);
    }
    call.saved_tangent = tangents.saved + node.saved_tangent;
  }

  METAAUG_DEVICE void bind_wants(OpCall<T>& call, const Wants& wants, const Frame<T>& frame, T* grad, const Pass& pass,
                                 T* (&dx)[2], T* (&dp)[2]) const {
    const Node& node = *call.node;
    for (int j = 0; j < 2; ++j) {
      if (wants.dx[j]) dx[j] = adjoint_of(frame, node.op.input[j]);
      if (wants.dp[j] && grad) dp[j] = grad + parameter_at(node, j, pass);
      call.accumulate[j] = wants.accumulate[j];
    }
  }
};

}  // namespace metaaug::cuda
