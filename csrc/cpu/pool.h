// Threads that help the calling one: torch's, or the pool's own where there is no OpenMP and in a forked child. Nobody
// waits for one of the latter that has not begun: on a busy machine, where a core may be away for milliseconds, a call
// takes as long as its own work and not as long as the slowest wake-up.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace metaaug::cpu {

class Pool {
 public:
  // The process's own pool, which grows on demand; a forked child gets another.
  static Pool& instance();

  // Runs body(item, worker) for items 0..count-1, each once, on at most `workers` threads, of which the calling one is
  // one. Calls take turns. The first exception stops the rest and is thrown here.
  void run(int workers, int count, const std::function<void(int item, int worker)>& body);

 private:
  void run_on_own_threads(int threads);
  void help();
  void work(int worker);

  std::mutex turn_;   // one run at a time
  std::mutex state_;  // guards what follows
  std::condition_variable begun_, idle_;
  int threads_ = 0, wanted_ = 0, active_ = 0;
  const std::function<void(int, int)>* body_ = nullptr;
  int count_ = 0;
  std::exception_ptr error_;
  std::atomic<int> next_{0}, joined_{0};
};

}  // namespace metaaug::cpu
