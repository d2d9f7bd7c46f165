// Every header whose inline functions other translation units share; see engine_isa.h for why they come first.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../flow.h"
#include "../../fuse.h"
#include "../engine.h"
