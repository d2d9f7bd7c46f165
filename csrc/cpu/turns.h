// Lets threads that took numbers 0, 1, 2, ... in order finish in that order.
#pragma once

#include <condition_variable>
#include <mutex>

namespace metaaug::METAAUG_ISA {

class Turns {
 public:
  // Of one number; its end, even by an exception, is the next one's beginning.
  class Turn {
   public:
    Turn(Turns& turns, int number) : turns_(turns), number_(number) {}
    ~Turn() {
      wait();
      const std::lock_guard<std::mutex> lock(turns_.mutex_);
      ++turns_.now_;
      turns_.changed_.notify_all();
    }
    // Until all before have ended.
    void wait() {
      std::unique_lock<std::mutex> lock(turns_.mutex_);
      turns_.changed_.wait(lock, [this] { return turns_.now_ == number_; });
    }

   private:
    Turns& turns_;
    const int number_;
  };

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int now_ = 0;
};

}  // namespace metaaug::METAAUG_ISA
