#include "pool.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace metaaug::cpu {
namespace {

// Never destroyed: its threads may outlive every destructor at exit.
Pool* current = nullptr;

void renew() { current = new Pool; }

}  // namespace

Pool& Pool::instance() {
  static std::once_flag once;
  std::call_once(once, [] {
    renew();
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, renew);  // threads do not survive a fork
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
    wanted_ = std::min(workers, count) - 1;
    for (; threads_ < wanted_; ++threads_) std::thread([this] { help(); }).detach();
  }
  if (wanted_ > 0) begun_.notify_all();
  work(0);
  std::unique_lock<std::mutex> lock(state_);
  wanted_ = 0;
  idle_.wait(lock, [this] { return active_ == 0; });
  if (error_) std::rethrow_exception(error_);
}

void Pool::help() {
  std::unique_lock<std::mutex> lock(state_);
  while (true) {
    begun_.wait(lock, [this] { return joined_ < wanted_ && next_ < count_; });
    const int worker = ++joined_;
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
