// The op table: which device code runs an op in each of its four roles.
#pragma once

#include "activation.h"
#include "batch_norm.h"
#include "conv2d.h"
#include "group_norm.h"
#include "linear_map.h"
#include "multiply.h"

namespace metaaug::cuda {

enum class Role { kForward, kBackward, kTangent, kTangentBackward };

template <class T, class F>
METAAUG_DEVICE void run_activation(Role role, const OpCall<T>& call, const F& f) {
  using A = Activation<T, F>;
  if (role == Role::kForward) return A::forward(call, f);
  if (role == Role::kBackward) return A::backward(call, f);
  if (role == Role::kTangent) return A::tangent(call, f);
  A::tangent_backward(call, f);
}

template <class T, class Map>
METAAUG_DEVICE void run_map(Role role, const OpCall<T>& call) {
  if (role == Role::kForward) {
    Map::prepare(call);
    return Map::map(call, call.x, call.y);
  }
  if (role == Role::kBackward) return Map::adjoint(call, call.dy, call.dx);
  if (role == Role::kTangent) return Map::map(call, call.x_t, call.y_t);
  Map::adjoint(call, call.dy_t, call.dx_t);
}

template <class T>
METAAUG_DEVICE void run_conv2d(Role role, const OpCall<T>& call) {
  if (role == Role::kForward) return Conv2d<T>::forward(call);
  if (role == Role::kBackward) return Conv2d<T>::backward(call);
  if (role == Role::kTangent) return Conv2d<T>::tangent(call);
  Conv2d<T>::tangent_backward(call);
}

template <class T>
METAAUG_DEVICE void run_multiply(Role role, const OpCall<T>& call) {
  if (role == Role::kForward) return Multiply<T>::forward(call);
  if (role == Role::kBackward) return Multiply<T>::backward(call);
  if (role == Role::kTangent) return Multiply<T>::tangent(call);
  Multiply<T>::tangent_backward(call);
}

template <class T, class Norm>
METAAUG_DEVICE void run_norm(Role role, const OpCall<T>& call) {
  const Norm norm(call);
  if (role == Role::kForward) return norm.forward();
  if (role == Role::kBackward) return norm.backward();
  if (role == Role::kTangent) return norm.tangent();
  norm.tangent_backward();
}

// Five passes call it: inlined in each it would take minutes to compile.
template <class T>
METAAUG_DEVICE METAAUG_NOINLINE void run_op(Role role, const OpCall<T>& call) {
  const Op& op = call.node->op;
  switch (op.kind) {
    case OpKind::kConv2d:
      return run_conv2d(role, call);
    case OpKind::kBatchNorm:
      if (op.pool) return run_norm<T, BatchNorm<T, true, true>>(role, call);
      if (op.relu) return run_norm<T, BatchNorm<T, true, false>>(role, call);
      return run_norm<T, BatchNorm<T, false, false>>(role, call);
    case OpKind::kLayerNorm:
    case OpKind::kGroupNorm:
      return run_norm<T, GroupNorm<T>>(role, call);
    case OpKind::kRelu:
      return run_activation(role, call, Relu<T>{});
    case OpKind::kLeakyRelu:
      return run_activation(role, call, LeakyRelu<T>{T(op.scalar[0])});
    case OpKind::kGelu:
      return run_activation(role, call, Gelu<T>{});
    case OpKind::kGeluTanh:
      return run_activation(role, call, GeluTanh<T>{});
    case OpKind::kTanh:
      return run_activation(role, call, Tanh<T>{});
    case OpKind::kSigmoid:
      return run_activation(role, call, Sigmoid<T>{});
    case OpKind::kSoftplus:
      return run_activation(role, call, Softplus<T>{T(op.scalar[0]), T(op.scalar[1])});
    case OpKind::kMaxPool:
      return run_map<T, MaxPool<T>>(role, call);
    case OpKind::kAvgPool:
      return run_map<T, AvgPool<T>>(role, call);
    case OpKind::kMeanPool:
      return run_map<T, MeanPool<T>>(role, call);
    case OpKind::kFlatten:
      return run_map<T, Flatten<T>>(role, call);
    case OpKind::kAdd:
      return run_map<T, Add<T>>(role, call);
    case OpKind::kMultiply:
      return run_multiply(role, call);
    case OpKind::kDropout:
      return run_map<T, Dropout<T>>(role, call);
  }
}

// How many elements an op keeps for a step's other passes, and in a tangent for the tangent of its backward.
inline int64_t saved_size(const Op& op, const Shape& in, const Shape& out, int images) {
  switch (op.kind) {
    case OpKind::kBatchNorm:
      return int64_t{BatchNorm<float, false, false>::kSaved} * in.channels;
    case OpKind::kLayerNorm:
    case OpKind::kGroupNorm:
      return int64_t{GroupNorm<float>::kSaved} * images * op.groups;
    case OpKind::kMaxPool:
    case OpKind::kDropout:
      return images * out.size();
    default:
      return 0;
  }
}

inline int64_t saved_tangent_size(const Op& op, const Shape& in, int images) {
  switch (op.kind) {
    case OpKind::kBatchNorm:
      return int64_t{BatchNorm<float, false, false>::kSavedTangent} * in.channels;
    case OpKind::kLayerNorm:
    case OpKind::kGroupNorm:
      return int64_t{GroupNorm<float>::kSavedTangent} * images * op.groups;
    default:
      return 0;
  }
}

}  // namespace metaaug::cuda
