// Division by a number that the host knows, by a multiplication: a GPU has no instruction for it.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace metaaug::cuda {

// Of dividends from 0 to 2^31 - 1, after Granlund and Montgomery (1994).
class Divide {
 public:
  Divide() = default;
  explicit Divide(int divisor) : divisor_(divisor) {
    while ((int64_t{1} << shift_) < divisor) ++shift_;
    magic_ = uint32_t(((uint64_t{1} << (31 + shift_)) + uint32_t(divisor) - 1) / uint32_t(divisor));
    shift_ -= divisor > 1;
  }

  METAAUG_HD int operator()(int n) const {
    return divisor_ == 1 ? n : int(uint32_t((uint64_t(uint32_t(n)) * magic_) >> 32) >> shift_);
  }

  // What is left of n, of which `quotient` has been found.
  METAAUG_HD int rest(int n, int quotient) const { return n - quotient * divisor_; }

 private:
  int divisor_ = 1;
  uint32_t magic_ = 0;
  int shift_ = 0;
};

}  // namespace metaaug::cuda
