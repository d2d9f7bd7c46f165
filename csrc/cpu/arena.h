// Memory of one worker.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <new>

namespace metaaug::METAAUG_ISA {

// Grown and never shrunk, and in large pages where it is large.
template <class T>
class Arena {
 public:
  void reserve(int64_t size) {
    if (size > size_) {
      memory_.reset();  // before the new block is there: nothing in the old one is needed
      const size_t bytes = size * sizeof(T), page = bytes >= 4 * kLargePage ? kLargePage : kLine;
      void* memory = nullptr;
      if (posix_memalign(&memory, page, bytes)) throw std::bad_alloc();
      memory_.reset(static_cast<T*>(memory));
#ifdef MADV_HUGEPAGE
      if (page == kLargePage) madvise(memory_.get(), bytes, MADV_HUGEPAGE);
#endif
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
  static constexpr size_t kLine = 64, kLargePage = 2 << 20;
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace metaaug::METAAUG_ISA
