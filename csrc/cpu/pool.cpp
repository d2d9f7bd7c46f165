#include "pool.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

// OpenMP's runtime, where torch has brought one (GNU's, or another with its entry points) into the process. After each
// of torch's operations its threads spin for some milliseconds and keep others from their cores, so they do the work.
#if defined(__linux__)
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
#endif

namespace metaaug::cpu {
namespace {

// Never destroyed: its threads may outlive every destructor at exit.
Pool* current = nullptr;
bool forked = false;

// Neither the threads of the parent nor those of its OpenMP are there.
void renew() {
  current = new Pool;
  forked = true;
}

}  // namespace

Pool& Pool::instance() {
  static std::once_flag once;
  std::call_once(once, [] {
    current = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, renew);
#endif
  });
  return *current;
}

void Pool::run(int workers, int count, const std::function<void(int, int)>& body) {
  const std::lock_guard<std::mutex> turn(turn_);
  {
    const std::lock_guard<std::mutex> lock(state_);
    body_ = &body;
    count_ = count;
    next_ = 0;
    joined_ = 0;
    error_ = nullptr;
  }
  const int threads = std::min(workers, count);
  if (threads <= 1) work(0);
#if defined(__linux__)
  else if (GOMP_parallel && !forked)
    GOMP_parallel([](void* pool) { static_cast<Pool*>(pool)->work(static_cast<Pool*>(pool)->joined_++); }, this,
                  unsigned(threads), 0);
#endif
  else
    run_on_own_threads(threads);
  if (error_) std::rethrow_exception(error_);
}

void Pool::run_on_own_threads(int threads) {
  {
    const std::lock_guard<std::mutex> lock(state_);
    joined_ = 1;
    wanted_ = threads;
    for (; threads_ < wanted_ - 1; ++threads_) std::thread([this] { help(); }).detach();
  }
  begun_.notify_all();
  work(0);
  std::unique_lock<std::mutex> lock(state_);
  wanted_ = 0;
  idle_.wait(lock, [this] { return active_ == 0; });
}

void Pool::help() {
  std::unique_lock<std::mutex> lock(state_);
  while (true) {
    begun_.wait(lock, [this] { return joined_ < wanted_ && next_ < count_; });
    const int worker = joined_++;
    ++active_;
    lock.unlock();
    work(worker);
    lock.lock();
    if (--active_ == 0) idle_.notify_one();
  }
}

void Pool::work(int worker) {
  try {
    for (int item; (item = next_++) < count_;) (*body_)(item, worker);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(state_);
    if (!error_) error_ = std::current_exception();
    next_ = count_;
  }
}

}  // namespace metaaug::cpu
