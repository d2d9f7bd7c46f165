// Losses of one task: the mean over samples of w_i loss_i, its adjoint, and the tangents that reach y and w.
#pragma once

#include "ops/op.h"

namespace metaaug::METAAUG_ISA {

// Targets of the samples in a pass, gathered when a step sees a minibatch of `rows`.
template <class T>
struct Targets {
  const int64_t* ids = nullptr;   // [N] class ids, or
  const T* values = nullptr;      // [N, C] probabilities or regression targets
  const T* weight = nullptr;      // [N] or null
  const int64_t* rows = nullptr;  // [images] indices of samples, or null for all in order

  int64_t sample(int n) const { return rows ? rows[n] : n; }
};

template <class T>
struct LossPlan {
  LossKind kind;
  int images = 0, classes = 0;
  int64_t stride = 0;
  T smoothing = 0;
};

template <class T>
T target(const LossPlan<T>& plan, const Targets<T>& y, int n, int c) {
  const int64_t sample = y.sample(n);
  const T raw = y.ids ? T(y.ids[sample] == c) : y.values[sample * plan.classes + c];
  if (plan.kind != LossKind::kCrossEntropy) return raw;
  return (T(1) - plan.smoothing) * raw + plan.smoothing / T(plan.classes);
}

// Weight of one sample's (element's) loss in the mean.
template <class T>
T share(const LossPlan<T>& plan, const Targets<T>& y, int n) {
  const T weight = y.weight ? y.weight[y.sample(n)] : T(1);
  return weight / T(plan.kind == LossKind::kCrossEntropy ? plan.images : int64_t{plan.images} * plan.classes);
}

// Returns the mean loss; cross entropy keeps its probabilities in `saved` [images, classes] for the tangent. dz (may be
// null) gets `scale` times its gradient; dy `[samples, C]` (may be null) has `scale` times the gradient with respect to
// float targets added to it.
template <class T>
T loss_forward(const LossPlan<T>& plan, const Targets<T>& y, const T* z, T scale, T* saved, T* dz, T* dy) {
  T total = 0;
  for (int n = 0; n < plan.images; ++n, z += plan.stride) {
    const T weight = share(plan, y, n);
    T loss = 0;
    if (plan.kind == LossKind::kCrossEntropy) {
      const T top = *std::max_element(z, z + plan.classes);
      T* p = saved + int64_t{n} * plan.classes;
      T sum = 0, mass = 0;
      for (int c = 0; c < plan.classes; ++c) sum += p[c] = std::exp(z[c] - top);
      const T log_sum = top + std::log(sum);
      for (int c = 0; c < plan.classes; ++c) {
        const T t = target(plan, y, n, c);
        p[c] /= sum;
        mass += t;
        if (t != T(0)) loss += t * (log_sum - z[c]);
        if (dy) dy[y.sample(n) * plan.classes + c] += scale * weight * (T(1) - plan.smoothing) * (log_sum - z[c]);
      }
      for (int c = 0; dz && c < plan.classes; ++c) dz[c] = scale * weight * (mass * p[c] - target(plan, y, n, c));
    } else {
      for (int c = 0; c < plan.classes; ++c) {
        const T t = target(plan, y, n, c);
        T slope, target_slope;
        if (plan.kind == LossKind::kMse) {
          loss += (z[c] - t) * (z[c] - t);
          slope = T(2) * (z[c] - t);
          target_slope = -slope;
        } else {
          loss += std::max(z[c], T(0)) - z[c] * t + std::log1p(std::exp(-std::abs(z[c])));
          slope = sigmoid(z[c]) - t;
          target_slope = -z[c];
        }
        if (dz) dz[c] = scale * weight * slope;
        if (dy) dy[y.sample(n) * plan.classes + c] += scale * weight * target_slope;
      }
    }
    total += weight * loss;
    if (dz) {
      std::fill(dz + plan.classes, dz + plan.stride, T(0));
      dz += plan.stride;
    }
  }
  return total;
}

// dz_t from z_t; the tangents of dloss/dy and dloss/dw are added to dy_t `[samples, C]`, dw_t `[samples]`.
template <class T>
void loss_tangent(const LossPlan<T>& plan, const Targets<T>& y, const T* z, const T* z_t, const T* saved, T* dz_t,
                  T* dy_t, T* dw_t) {
  for (int n = 0; n < plan.images; ++n, z += plan.stride, z_t += plan.stride, dz_t += plan.stride) {
    const T weight = share(plan, y, n);
    const int64_t sample = y.sample(n), at = sample * plan.classes;
    T loss_t = 0;
    if (plan.kind == LossKind::kCrossEntropy) {
      const T* p = saved + int64_t{n} * plan.classes;
      T mean_t = 0, mass = 0;
      for (int c = 0; c < plan.classes; ++c) {
        mean_t += p[c] * z_t[c];
        mass += target(plan, y, n, c);
      }
      for (int c = 0; c < plan.classes; ++c) {
        dz_t[c] = weight * mass * p[c] * (z_t[c] - mean_t);
        loss_t += target(plan, y, n, c) * (mean_t - z_t[c]);
        if (dy_t) dy_t[at + c] += weight * (T(1) - plan.smoothing) * (mean_t - z_t[c]);
      }
      if (dw_t) dw_t[sample] += loss_t / T(plan.images);
    } else {
      for (int c = 0; c < plan.classes; ++c) {
        const T t = target(plan, y, n, c);
        T slope, curvature, target_slope;
        if (plan.kind == LossKind::kMse) {
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
        if (dy_t) dy_t[at + c] += weight * target_slope * z_t[c];
      }
      if (dw_t) dw_t[sample] += loss_t / T(int64_t{plan.images} * plan.classes);
    }
    std::fill(dz_t + plan.classes, dz_t + plan.stride, T(0));
  }
}

// Share of samples whose largest output is the target's class.
template <class T>
T accuracy(const LossPlan<T>& plan, const Targets<T>& y, const T* z) {
  int right = 0;
  for (int n = 0; n < plan.images; ++n, z += plan.stride) {
    int best = 0, wanted = 0;
    for (int c = 1; c < plan.classes; ++c) {
      if (z[c] > z[best]) best = c;
      if (!y.ids && target(plan, y, n, c) > target(plan, y, n, wanted)) wanted = c;
    }
    if (y.ids) wanted = int(y.ids[y.sample(n)]);
    right += best == wanted;
  }
  return T(right) / T(plan.images);
}

}  // namespace metaaug::METAAUG_ISA
