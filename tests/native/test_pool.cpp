// The threads of the engine, for the thread sanitizer: every item is run once, whoever asks and whatever is thrown.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/pool.h"

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace {

using metaaug::cpu::Pool;

void check_run(int workers, int count) {
  std::vector<int> runs(count);                 // not atomic: an item belongs to one thread
  std::vector<std::vector<int>> seen(workers);  // nor this: no two threads are the same worker at a time
  Pool::instance().run(workers, count, [&](int item, int worker) {
    ++runs[item];
    seen.at(worker).push_back(item);
  });
  size_t total = 0;
  for (int each : runs) CHECK(each == 1);
  for (const auto& each : seen) total += each.size();
  CHECK(int(total) == count);
}

void check_throw(int workers, int count) {
  bool thrown = false;
  try {
    Pool::instance().run(workers, count, [&](int item, int) {
      if (item == count / 2) throw std::runtime_error("item");
    });
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  CHECK(thrown);
}

}  // namespace

int main() {
  for (int repeat = 0; repeat < 200; ++repeat)
    for (int workers : {1, 2, 5, 3})
      for (int count : {0, 1, 2, 64}) {
        check_run(workers, count);
        if (count > 0) check_throw(workers, count);
      }
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([caller] {
      for (int repeat = 0; repeat < 100; ++repeat) check_run(1 + (caller + repeat) % 4, 17);
    });
  for (std::thread& each : callers) each.join();
  std::puts("done");
}
