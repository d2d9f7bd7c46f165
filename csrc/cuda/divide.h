// Division by a number that the host knows, by a multiplication where that is exact: a GPU has no instruction for it.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace metaaug::cuda {

class Divide {
 public:
  Divide() = default;

  // For dividends from 0 to `limit`.
  Divide(int divisor, int64_t limit) : divisor_(divisor) {
    if (divisor > 1 && limit * divisor < (int64_t{1} << 32))
      magic_ = uint32_t(((uint64_t{1} << 32) - 1) / uint32_t(divisor) + 1);
  }

  METAAUG_HD int operator()(int n) const {
    if (magic_) return int((uint64_t(uint32_t(n)) * magic_) >> 32);
    return divisor_ == 1 ? n : n / divisor_;
  }

  // What is left of n, of which `quotient` has been found.
  METAAUG_HD int rest(int n, int quotient) const { return n - quotient * divisor_; }

 private:
  int divisor_ = 1;
  uint32_t magic_ = 0;
};

}  // namespace metaaug::cuda
