// Scalar formulas, written once for host and device: activations with two derivatives, dropout's counter hash.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace metaaug {

// Of the standard library's these two are the host's alone.
#if defined(__CUDA_ARCH__)
template <class T>
METAAUG_HD T log1p(T x) {
  return ::log1p(x);
}
template <class T>
METAAUG_HD T erfc(T x) {
  return ::erfc(x);
}
#else
using std::erfc;
using std::log1p;
#endif

template <class T>
METAAUG_HD bool is_finite(T x) {
  return x - x == T(0);
}

// Every activation gives value(x), first(x), second(x); NaN passes through.
template <class T>
struct Relu {
  METAAUG_HD T value(T x) const { return x < T(0) ? T(0) : x; }
  METAAUG_HD T first(T x) const { return x > T(0) ? T(1) : T(0); }
  METAAUG_HD T second(T) const { return T(0); }
};

template <class T>
struct LeakyRelu {
  T slope;
  METAAUG_HD T value(T x) const { return x > T(0) ? x : slope * x; }
  METAAUG_HD T first(T x) const { return x > T(0) ? T(1) : slope; }
  METAAUG_HD T second(T) const { return T(0); }
};

template <class T>
METAAUG_HD T sigmoid(T x) {
  // exp of a non-positive number only, so that neither branch overflows.
  const T e = std::exp(x < T(0) ? x : -x);
  return (x < T(0) ? e : T(1)) / (T(1) + e);
}

template <class T>
struct Sigmoid {
  METAAUG_HD T value(T x) const { return sigmoid(x); }
  METAAUG_HD T first(T x) const {
    const T s = sigmoid(x);
    return s * (T(1) - s);
  }
  METAAUG_HD T second(T x) const {
    const T s = sigmoid(x);
    return s * (T(1) - s) * (T(1) - T(2) * s);
  }
};

template <class T>
struct Tanh {
  METAAUG_HD T value(T x) const { return std::tanh(x); }
  METAAUG_HD T first(T x) const {
    const T y = std::tanh(x);
    return T(1) - y * y;
  }
  METAAUG_HD T second(T x) const {
    const T y = std::tanh(x);
    return T(-2) * y * (T(1) - y * y);
  }
};

// log(1 + exp(beta x)) / beta; the identity where beta x > threshold, as torch has it.
template <class T>
struct Softplus {
  T beta, threshold;
  METAAUG_HD T value(T x) const { return beta * x > threshold ? x : metaaug::log1p(std::exp(beta * x)) / beta; }
  METAAUG_HD T first(T x) const { return beta * x > threshold ? T(1) : sigmoid(beta * x); }
  METAAUG_HD T second(T x) const {
    const T s = sigmoid(beta * x);
    return beta * x > threshold ? T(0) : beta * s * (T(1) - s);
  }
};

// x Phi(x); Phi' = phi, phi' = -x phi.
template <class T>
struct Gelu {
  METAAUG_HD static T density(T x) { return T(0.3989422804014326779) * std::exp(T(-0.5) * x * x); }
  METAAUG_HD static T normal(T x) { return T(0.5) * metaaug::erfc(T(-0.7071067811865475244) * x); }
  METAAUG_HD T value(T x) const { return x * normal(x); }
  METAAUG_HD T first(T x) const { return normal(x) + x * density(x); }
  METAAUG_HD T second(T x) const { return density(x) * (T(2) - x * x); }
};

// x (1 + tanh(u)) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3).
template <class T>
struct GeluTanh {
  static constexpr double kScale = 0.7978845608028653559, kCube = 0.044715;
  METAAUG_HD static T inner(T x) { return T(kScale) * (x + T(kCube) * x * x * x); }
  METAAUG_HD static T slope(T x) { return T(kScale) * (T(1) + T(3 * kCube) * x * x); }
  METAAUG_HD T value(T x) const { return T(0.5) * x * (T(1) + std::tanh(inner(x))); }
  METAAUG_HD T first(T x) const {
    const T t = std::tanh(inner(x));
    return T(0.5) * (T(1) + t) + T(0.5) * x * (T(1) - t * t) * slope(x);
  }
  METAAUG_HD T second(T x) const {
    const T t = std::tanh(inner(x)), u1 = slope(x), u2 = T(6 * kScale * kCube) * x, d = T(1) - t * t;
    return d * u1 + T(0.5) * x * (d * u2 - T(2) * t * d * u1 * u1);
  }
};

METAAUG_HD uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  return x ^ (x >> 16);
}

// Key of one dropout call in one pass over one task; see metaaug_fast/dropout.py for the specification.
METAAUG_HD uint32_t dropout_key(uint32_t seed, uint32_t task, uint32_t pass, uint32_t site) {
  return mix(mix(mix(mix(seed) ^ task) ^ pass) ^ site);
}

// Uniform in [0, 1) for one element of that call's tensor, in the user's element order.
METAAUG_HD double dropout_uniform(uint32_t key, uint32_t element) {
  return mix(mix(key ^ element) + key) * (1.0 / 4294967296.0);
}

}  // namespace metaaug
