// What every op's device code is given, and how it runs: all threads of a team call it, each does its share, and the
// caller puts a barrier behind it.
#pragma once

#include "../program.h"
#include "../update.h"

namespace metaaug::cuda {

// How products go through tiles, for which shared memory then is; see tile.h. `used`: not everything lies there
// already.
template <class T>
struct TileRoom {
  bool used = false;
  T* partials = nullptr;
  Precision precision = Precision::kFloat32;
};

// As cpu/ops/op.h: `_t` is a tangent, null is zero or not wanted. What is stored goes through the functions below.
template <class T>
struct OpCall {
  const Node* node = nullptr;
  int images = 0;
  const T* x[2] = {};
  T* y = nullptr;
  const T* p[2] = {};
  const T* x_t[2] = {};
  T* y_t = nullptr;
  const T* p_t[2] = {};
  const T* dy = nullptr;
  T* dx[2] = {};
  T* dp[2] = {};
  const T* dy_t = nullptr;
  T* dx_t[2] = {};
  T* dp_t[2] = {};
  bool accumulate[2] = {};
  T* saved = nullptr;
  T* saved_tangent = nullptr;
  const T* frozen[2] = {};  // mean, variance
  uint32_t key = 0;         // dropout
  TileRoom<T> tiles;
  ParameterStep<T> step[2];  // what is done with a gradient instead of storing it

  METAAUG_DEVICE bool moves() const { return x_t[0] || x_t[1] || p_t[0] || p_t[1]; }
  METAAUG_DEVICE int size() const { return int(images * node->out.size()); }

  // An element of y or y_t; a product's relu is drawn in.
  METAAUG_DEVICE void put_value(bool tangent, int i, T value) const {
    if (tangent)
      y_t[i] = node->op.relu && !(y[i] > T(0)) ? T(0) : value;
    else
      y[i] = node->op.relu && value < T(0) ? T(0) : value;
  }

  // An element of dx or dx_t, which is `to`.
  METAAUG_DEVICE void put_adjoint(T* const* to, int j, int i, T value) const {
    if (node->masked[j] && !(x[j][i] > T(0))) value = T(0);
    to[j][i] = accumulate[j] ? to[j][i] + value : value;
  }

  // Of an op of two inputs, of which the second may have one pixel for all of a sample's: which element of it belongs
  // to element i of the other.
  METAAUG_DEVICE int second(int i) const {
    return node->in[1].pixels() == node->out.pixels() ? i : node->by_out_pixels(i);
  }

  // Its second adjoint, of value(element of the output).
  template <class Value>
  METAAUG_DEVICE void put_second(T* const* to, const Value& value) const {
    const int shared = node->out.pixels() / node->in[1].pixels();
    each(images * node->in[1].size(), [&](int i) {
      T sum = 0;
      for (int j = 0; j < shared; ++j) sum += value(i * shared + j);
      put_adjoint(to, 1, i, sum);
    });
  }

  // Adds to an element of dp or dp_t, which is `to`, or makes the inner step with it.
  METAAUG_DEVICE void add_gradient(T* const* to, int j, int i, T value) const {
    if (step[j])
      step[j](i, value);
    else
      to[j][i] += value;
  }
};

template <class T>
METAAUG_DEVICE T value_or(const T* source, int at, T absent) {
  return source ? source[at] : absent;
}

}  // namespace metaaug::cuda
