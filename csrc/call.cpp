#include "call.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace metaaug {

int64_t kept_bytes() {
  long long mib = 256;
  if (const char* asked = std::getenv("METAAUG_KEEP_MIB")) {
    char* end = nullptr;
    mib = std::strtoll(asked, &end, 10);
    if (end == asked || *end || mib < 0 || mib > (1 << 24))
      throw std::invalid_argument("METAAUG_KEEP_MIB must be a number of MiB, 0 to 16777216 (got " + std::string(asked) +
                                  ")");
  }
  return int64_t{mib} << 20;
}

}  // namespace metaaug
