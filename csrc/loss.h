// Losses of one sample, written once for host and device: the value, its adjoint, and the tangents that reach y and w.
#pragma once

#include "graph.h"
#include "math.h"

namespace metaaug {

// Targets of the samples in a pass, gathered when a step sees a minibatch of `rows`.
template <class T>
struct Targets {
  const int64_t* ids = nullptr;   // [N] class ids, or
  const T* values = nullptr;      // [N, C] probabilities or regression targets
  const T* weight = nullptr;      // [N] or null
  const int64_t* rows = nullptr;  // [images] indices of samples, or null for all in order

  METAAUG_HD int64_t sample(int n) const { return rows ? rows[n] : n; }
};

// The loss of a pass is the mean over samples of w_i loss_i.
template <class T>
struct LossPlan {
  LossKind kind = LossKind::kCrossEntropy;
  int images = 0, classes = 0;
  int64_t stride = 0;  // between samples' outputs
  T smoothing = 0;

  METAAUG_HD T target(const Targets<T>& y, int n, int c) const {
    const int64_t sample = y.sample(n);
    const T raw = y.ids ? T(y.ids[sample] == c) : y.values[sample * classes + c];
    if (kind != LossKind::kCrossEntropy) return raw;
    return (T(1) - smoothing) * raw + smoothing / T(classes);
  }

  // How many losses are averaged: a sample each, or an output each.
  METAAUG_HD int64_t count() const { return kind == LossKind::kCrossEntropy ? images : int64_t{images} * classes; }

  // Weight of one sample's (output's) loss in the mean.
  METAAUG_HD T share(const Targets<T>& y, int n) const {
    return (y.weight ? y.weight[y.sample(n)] : T(1)) / T(count());
  }

  // Sample n's share of the loss; cross entropy keeps its probabilities in `p` [classes] for the tangent. dz (may be
  // null) gets `scale` times its gradient; dy `[samples, C]` (may be null) has `scale` times the gradient with respect
  // to float targets added to it.
  METAAUG_HD T value(const Targets<T>& y, int n, const T* z, T scale, T* p, T* dz, T* dy) const {
    const T weight = share(y, n);
    T* to = dy ? dy + y.sample(n) * classes : nullptr;
    T loss = 0;
    if (kind == LossKind::kCrossEntropy) {
      T top = z[0], sum = 0, mass = 0;
      for (int c = 1; c < classes; ++c) top = top < z[c] ? z[c] : top;
      for (int c = 0; c < classes; ++c) sum += p[c] = std::exp(z[c] - top);
      const T log_sum = top + std::log(sum);
      for (int c = 0; c < classes; ++c) {
        const T t = target(y, n, c);
        p[c] /= sum;
        mass += t;
        if (t != T(0)) loss += t * (log_sum - z[c]);
        if (to) to[c] += scale * weight * (T(1) - smoothing) * (log_sum - z[c]);
      }
      for (int c = 0; dz && c < classes; ++c) dz[c] = scale * weight * (mass * p[c] - target(y, n, c));
      return weight * loss;
    }
    for (int c = 0; c < classes; ++c) {
      const T t = target(y, n, c);
      T slope, target_slope;
      if (kind == LossKind::kMse) {
        loss += (z[c] - t) * (z[c] - t);
        slope = T(2) * (z[c] - t);
        target_slope = -slope;
      } else {
        loss += (z[c] < T(0) ? T(0) : z[c]) - z[c] * t + metaaug::log1p(std::exp(z[c] < T(0) ? z[c] : -z[c]));
        slope = sigmoid(z[c]) - t;
        target_slope = -z[c];
      }
      if (dz) dz[c] = scale * weight * slope;
      if (to) to[c] += scale * weight * target_slope;
    }
    return weight * loss;
  }

  // dz_t from z_t; the tangents of dloss/dy and dloss/dw are added to dy_t `[samples, C]`, dw_t `[samples]`.
  METAAUG_HD void tangent(const Targets<T>& y, int n, const T* z, const T* z_t, const T* p, T* dz_t, T* dy_t,
                          T* dw_t) const {
    const T weight = share(y, n);
    T* to = dy_t ? dy_t + y.sample(n) * classes : nullptr;
    T loss_t = 0;
    if (kind == LossKind::kCrossEntropy) {
      T mean_t = 0, mass = 0;
      for (int c = 0; c < classes; ++c) {
        mean_t += p[c] * z_t[c];
        mass += target(y, n, c);
      }
      for (int c = 0; c < classes; ++c) {
        dz_t[c] = weight * mass * p[c] * (z_t[c] - mean_t);
        loss_t += target(y, n, c) * (mean_t - z_t[c]);
        if (to) to[c] += weight * (T(1) - smoothing) * (mean_t - z_t[c]);
      }
    } else {
      for (int c = 0; c < classes; ++c) {
        const T t = target(y, n, c);
        T slope, curvature, target_slope;
        if (kind == LossKind::kMse) {
          slope = T(2) * (z[c] - t);
          curvature = T(2);
          target_slope = T(-2);
        } else {
          const T s = sigmoid(z[c]);
          slope = s - t;
          curvature = s * (T(1) - s);
          target_slope = T(-1);
        }
        dz_t[c] = weight * curvature * z_t[c];
        loss_t += slope * z_t[c];
        if (to) to[c] += weight * target_slope * z_t[c];
      }
    }
    if (dw_t) dw_t[y.sample(n)] += loss_t / T(count());
  }

  // Whether the largest output is the target's class.
  METAAUG_HD bool right(const Targets<T>& y, int n, const T* z) const {
    int best = 0, wanted = 0;
    for (int c = 1; c < classes; ++c) {
      if (z[c] > z[best]) best = c;
      if (!y.ids && target(y, n, c) > target(y, n, wanted)) wanted = c;
    }
    return best == (y.ids ? int(y.ids[y.sample(n)]) : wanted);
  }
};

}  // namespace metaaug
