// Draws episodes where the images lie: classes and samples by counter, as metaaug_fast/data/draws.py specifies, then a
// gather. A block makes a task.
#pragma once

#include "block.h"
#include "engine.h"

namespace metaaug::cuda {

inline constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

// SplitMix64's finaliser.
METAAUG_HD uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// `count` different integers below `population`, from the values of a task's stream that begin at `used`.
METAAUG_HD void draw_distinct(uint64_t task_key, int64_t used, int64_t population, int count, int64_t* values) {
  const auto swapped = [&](int entry) {
    const uint64_t bits = mix64(task_key + kGolden * uint64_t(used + entry + 1));
    return int64_t((bits >> 32) * uint64_t(population - entry) >> 32) + entry;
  };
  for (int entry = count - 1; entry >= 0; --entry) {
    const int64_t here = values[entry] = swapped(entry);
    for (int later = entry + 1; later < count; ++later)
      if (values[later] == here) values[later] = entry;
  }
}

template <class T>
METAAUG_DEVICE T pixel_of(const Episodes<T>& e, int64_t at) {
  if (e.pixel == Pixel::kByte) return T(static_cast<const unsigned char*>(e.images)[at]) / T(255);
  if (e.pixel == Pixel::kFloat) return T(static_cast<const float*>(e.images)[at]);
  return T(static_cast<const double*>(e.images)[at]);
}

template <class T>
METAAUG_KERNEL void sample_episodes(const Episodes<T> e) {
  int64_t* drawn = reinterpret_cast<int64_t*>(shared_memory());  // [ways]
  int64_t* rows = drawn + e.ways;                                // [ways, shots + queries]
  for (int task = team(); task < e.tasks; task += teams()) {
    const uint64_t task_key = mix64(e.key + kGolden * uint64_t(task + 1));
    if (thread() == 0) draw_distinct(task_key, 0, e.classes, e.ways, drawn);
    sync();
    each(e.ways, [&](int way) {
      const int64_t c = drawn[way];
      draw_distinct(task_key, e.ways + way * e.rows(), e.sizes[c], e.rows(), rows + way * e.rows());
      for (int i = 0; i < e.rows(); ++i) rows[way * e.rows() + i] += e.first[c];
    });
    sync();
    const auto gather = [&](int from, int count, T* x, int64_t* y) {
      const int samples = e.ways * count, size = int(e.sample);
      each(int64_t{samples} * size, [&](int i) {
        const int n = i / size;
        const int64_t row = rows[n / count * e.rows() + from + n % count];
        x[int64_t{task} * samples * size + i] = pixel_of(e, row * size + i % size);
      });
      each(samples, [&](int n) { y[int64_t{task} * samples + n] = n / count; });
    };
    gather(0, e.shots, e.support_x, e.support_y);
    gather(e.shots, e.queries, e.query_x, e.query_y);
    sync();
  }
}

}  // namespace metaaug::cuda
