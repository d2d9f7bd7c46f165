// What is launched: the whole inner loop, its query and its reverse, a team for each task; and sums over tasks.
#pragma once

#include "task.h"

namespace metaaug::cuda {

// So many blocks share a multiprocessor's registers.
inline constexpr int kTogether = 2;

template <class T>
METAAUG_KERNEL METAAUG_BOUNDS(kThreads, kTogether) void run_tasks(const METAAUG_GRID_CONSTANT Arguments<T> a) {
  join_team(a.team_states);
  for (int task = team(); task < a.tasks; task += teams()) {
    Task<T>(a, a.first_task + task).run();
    sync();  // the next one writes where this one reads
  }
}

// Sums of columns of [rows, size], in an order that depends on the numbers of rows and threads alone.
template <class T>
struct Columns {
  const T* rows;
  int count;
  int64_t size, first, columns;  // which columns
  T* to;                         // [columns]
  T scale;
  bool accumulate;
};

template <class T>
METAAUG_KERNEL void sum_columns(Columns<T> c) {
  T* parts = reinterpret_cast<T*>(shared_memory());  // [warps, lanes]
  for (int64_t first = int64_t{team()} * kWarp; first < c.columns; first += int64_t{teams()} * kWarp) {
    const int64_t column = first + lane();
    T sum = 0;
    if (column < c.columns)
      for (int row = warp(); row < c.count; row += warps()) sum += c.rows[row * c.size + c.first + column];
    parts[thread()] = sum;
    sync();
    if (warp() == 0 && column < c.columns) {
      T total = 0;
      for (int i = 0; i < warps(); ++i) total += parts[i * kWarp + lane()];
      c.to[column] = (c.accumulate ? c.to[column] : T(0)) + c.scale * total;
    }
    sync();
  }
}

}  // namespace metaaug::cuda
