// What every op's device code is given, and how it runs: all threads of a team call it, each does its share, and the
// caller puts a barrier behind it.
#pragma once

#include "../block.h"
#include "../program.h"

namespace metaaug::cuda {

// As cpu/ops/op.h: `_t` is a tangent, null is zero or not wanted; parameter adjoints are added to, dx where
// `accumulate` says so.
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
  T* tile = nullptr;        // room in shared memory for tiles, where tasks lie in global memory

  METAAUG_DEVICE bool moves() const { return x_t[0] || x_t[1] || p_t[0] || p_t[1]; }
  METAAUG_DEVICE int64_t size() const { return images * node->out.size(); }
};

template <class T>
METAAUG_DEVICE void put(T* target, T value, bool accumulate) {
  *target = accumulate ? *target + value : value;
}

template <class T>
METAAUG_DEVICE T value_or(const T* source, int64_t at, T absent) {
  return source ? source[at] : absent;
}

}  // namespace metaaug::cuda
