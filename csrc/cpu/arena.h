// Memory of one worker.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace metaaug::METAAUG_ISA {

// Grown and never shrunk.
template <class T>
class Arena {
 public:
  void reserve(int64_t size) {
    if (size > size_) {
      memory_.reset();  // before the new block is there: nothing in the old one is needed
      memory_.reset(static_cast<T*>(::operator new(size * sizeof(T), kPage)));
      size_ = size;
    }
    used_ = 0;
  }
  T* take(int64_t size) {
    T* at = memory_.get() + used_;
    used_ += round(size);
    return at;
  }
  int64_t used() const { return used_; }
  void rewind(int64_t used) { used_ = used; }
  static int64_t round(int64_t size) {  // blocks start on a cache line
    constexpr int64_t kValues = kLine / sizeof(T);
    return (size + kValues - 1) / kValues * kValues;
  }

 private:
  static constexpr std::align_val_t kPage{4096};
  static constexpr int64_t kLine = 64;
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, kPage); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace metaaug::METAAUG_ISA
