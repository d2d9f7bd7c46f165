#undef _FORTIFY_SOURCE  // its longjmp knows of one stack alone
#include "emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace metaaug::cuda::emulation {
namespace {

enum class State { kReady, kAtBarrier, kAtBlockBarrier, kInWarp, kEnded };

constexpr size_t kStack = 256 << 10;
constexpr size_t kGuard = 64;  // bytes behind shared memory that nobody may write
constexpr unsigned char kPoison = 0xff;

// Pages of its own, so that only what a thread touches takes memory.
class Stack {
 public:
  Stack() : memory_(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
  }
  Stack(Stack&& other) noexcept : memory_(other.memory_) { other.memory_ = MAP_FAILED; }
  ~Stack() {
    if (memory_ != MAP_FAILED) munmap(memory_, kStack);
  }
  void* data() const { return memory_; }

 private:
  void* memory_;
};

struct Fiber {
  ucontext_t context;
  jmp_buf left;
  bool entered = false;
  Stack stack;
  State state = State::kEnded;
  bool vote = false;
  void* given = nullptr;
  size_t size = 0;
  void (*combine)(void*) = nullptr;
};

struct Machine {
  ucontext_t scheduler;
  jmp_buf waiting;  // the scheduler
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> shared;  // of each block of the team
  size_t shared_bytes = 0;
  const std::function<void()>* kernel = nullptr;
  int current = 0, threads = 0, members = 0, team = 0, teams = 0;
  bool any = false;
};

// Asked for at every turn, so at a place that is known without a call.
__attribute__((tls_model("initial-exec"))) thread_local Machine* machine = nullptr;

#if defined(__SANITIZE_ADDRESS__)
// The sanitizer wants to know of every change of stacks.
void enter(Fiber& fiber) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.data(), kStack);
  swapcontext(&machine->scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void leave(State state) {
  Fiber& fiber = machine->fibers[machine->current];
  fiber.state = state;
  void* fake = nullptr;
  const bool ends = state == State::kEnded;
  __sanitizer_start_switch_fiber(ends ? nullptr : &fake, machine->scheduler_stack, machine->scheduler_size);
  swapcontext(&fiber.context, &machine->scheduler);
  __sanitizer_finish_switch_fiber(fake, &machine->scheduler_stack, &machine->scheduler_size);
}
#else
// Only the first change to a stack asks the system for anything.
void enter(Fiber& fiber) {
  if (_setjmp(machine->waiting)) return;
  if (fiber.entered) _longjmp(fiber.left, 1);
  fiber.entered = true;
  setcontext(&fiber.context);
}

void leave(State state) {
  Fiber& fiber = machine->fibers[machine->current];
  fiber.state = state;
  if (!_setjmp(fiber.left)) _longjmp(machine->waiting, 1);
}
#endif

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine->scheduler_stack, &machine->scheduler_size);
#endif
  (*machine->kernel)();
  leave(State::kEnded);
}

bool all(size_t first, size_t last, State state) {
  return std::all_of(machine->fibers.begin() + first, machine->fibers.begin() + last,
                     [=](const Fiber& fiber) { return fiber.state == state; });
}

void release_warps() {
  for (size_t first = 0; first < machine->fibers.size(); first += kWarp) {
    const size_t last = std::min(first + kWarp, machine->fibers.size());
    if (last - first < kWarp || !all(first, last, State::kInWarp)) continue;
    Fiber* lanes = &machine->fibers[first];
    const size_t size = lanes[0].size;
    std::vector<double> values(kWarp * size / sizeof(double) + 1);
    char* bytes = reinterpret_cast<char*>(values.data());
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i].combine != lanes[0].combine) throw std::logic_error("lanes of a warp take part in different sums");
      std::memcpy(bytes + i * size, lanes[i].given, size);
    }
    lanes[0].combine(bytes);
    for (int i = 0; i < kWarp; ++i) {
      std::memcpy(lanes[i].given, bytes + i * size, size);
      lanes[i].state = State::kReady;
    }
  }
}

void release_barriers() {
  const size_t threads = machine->threads;
  for (size_t first = 0; first < machine->fibers.size(); first += threads)
    if (all(first, first + threads, State::kAtBlockBarrier))
      for (size_t i = first; i < first + threads; ++i) machine->fibers[i].state = State::kReady;
  if (!all(0, machine->fibers.size(), State::kAtBarrier)) return;
  machine->any = false;
  for (Fiber& fiber : machine->fibers) {
    machine->any |= fiber.vote;
    fiber.state = State::kReady;
  }
}

void check_progress() {
  int count[5] = {};
  for (const Fiber& fiber : machine->fibers) ++count[int(fiber.state)];
  if (count[int(State::kReady)] || count[int(State::kEnded)] == int(machine->fibers.size())) return;
  const auto number = [&](State state) { return std::to_string(count[int(state)]); };
  throw std::logic_error("team " + std::to_string(machine->team) + ": of " + std::to_string(machine->fibers.size()) +
                         " threads, " + number(State::kAtBarrier) + " wait at a barrier, " +
                         number(State::kAtBlockBarrier) + " at their block's, " + number(State::kInWarp) +
                         " in a warp's sum, and " + number(State::kEnded) + " have ended");
}

void run_team(std::mt19937& generator) {
  for (const auto& shared : machine->shared) std::memset(shared.get(), kPoison, machine->shared_bytes + kGuard);
  std::vector<int> order(machine->fibers.size());
  for (size_t i = 0; i < order.size(); ++i) {
    Fiber& fiber = machine->fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
    fiber.state = State::kReady;
    fiber.entered = false;
    order[i] = int(i);
  }
  std::vector<char> sleeps(machine->members);  // so that blocks get far ahead of each other
  while (!all(0, machine->fibers.size(), State::kEnded)) {
    std::shuffle(order.begin(), order.end(), generator);
    for (char& each : sleeps) each = machine->members > 1 && generator() % 4 == 0 ? !each : each;
    bool any = false;
    for (int i : order) {
      if (machine->fibers[i].state != State::kReady || sleeps[i / machine->threads]) continue;
      any = true;
      machine->current = i;
      enter(machine->fibers[i]);
    }
    if (!any) std::fill(sleeps.begin(), sleeps.end(), 0);  // the others wait for them
    release_warps();
    release_barriers();
    check_progress();
  }
  for (const auto& shared : machine->shared) {
    const char* guard = shared.get() + machine->shared_bytes;
    if (std::any_of(guard, guard + kGuard, [](char byte) { return static_cast<unsigned char>(byte) != kPoison; }))
      throw std::logic_error("team " + std::to_string(machine->team) + " wrote beyond its shared memory");
  }
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// To the nearest with so many bits less of the mantissa; halves go away from zero, or to even. What is not finite stays
// so.
uint32_t rounded(float value, int less, bool to_even) {
  const uint32_t bits = bits_of(value), half = 1U << (less - 1), mask = ~((1U << less) - 1);
  if (!std::isfinite(value)) return (bits & mask) | (std::isnan(value) ? 0x7fc00000U : 0);
  return (bits + half - (to_even && !(bits >> less & 1) ? 1 : 0)) & mask;
}

struct Fragment {
  float sum[4];
  uint32_t a[4], b[2];
};

// The value at a depth of row or column g: which lane has it, in which register, in which half.
template <bool kBf16>
float element(const Fragment* lanes, int g, int depth, int row_half, bool of_a) {
  const int pair = kBf16 ? depth / 2 : depth, lane = g * 4 + pair % 4;
  const uint32_t bits = of_a ? lanes[lane].a[pair / 4 * 2 + row_half] : lanes[lane].b[pair / 4];
  if (!kBf16) return float_of(bits);
  return float_of(depth % 2 ? bits & 0xffff0000U : bits << 16);
}

template <bool kBf16>
void multiply_lanes(void* values) {
  Fragment* lanes = static_cast<Fragment*>(values);
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      double sum = lanes[lane].sum[i];
      for (int depth = 0; depth < (kBf16 ? 16 : 8); ++depth)
        sum += double(element<kBf16>(lanes, lane / 4, depth, i / 2, true)) *
               double(element<kBf16>(lanes, lane % 4 * 2 + i % 2, depth, 0, false));
      lanes[lane].sum[i] = float(sum);
    }
}

uint32_t next_seed() {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  static std::mt19937 seeds([] {
    const char* asked = std::getenv("METAAUG_EMULATION_SEED");
    return asked ? uint32_t(std::strtoul(asked, nullptr, 10)) : std::random_device()();
  }());
  return uint32_t(seeds());
}

}  // namespace

void run(int teams, int members, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  static thread_local Machine kept;
  machine = &kept;
  machine->teams = teams;
  machine->members = members;
  machine->threads = threads;
  machine->shared_bytes = shared_bytes;
  machine->shared.clear();
  for (int i = 0; i < members; ++i) machine->shared.emplace_back(new char[shared_bytes + kGuard]);
  machine->kernel = &kernel;
  machine->fibers.resize(size_t(members) * threads);
  std::mt19937 generator(next_seed());
  for (machine->team = 0; machine->team < teams; ++machine->team) run_team(generator);
}

int thread() { return machine->current % machine->threads; }
int threads() { return machine->threads; }
int member() { return machine->current / machine->threads; }
int members() { return machine->members; }
int team() { return machine->team; }
int teams() { return machine->teams; }
char* shared_memory() { return machine->shared[member()].get(); }
void block_sync() { leave(State::kAtBlockBarrier); }

bool sync_or(bool value) {
  machine->fibers[machine->current].vote = value;
  leave(State::kAtBarrier);
  return machine->any;
}

void exchange(void* value, size_t size, void (*combine)(void*)) {
  Fiber& fiber = machine->fibers[machine->current];
  fiber.given = value;
  fiber.size = size;
  fiber.combine = combine;
  leave(State::kInWarp);
}

uint32_t as_tf32(float value) { return rounded(value, 13, false); }
uint32_t as_bf16_pair(float low, float high) { return rounded(low, 16, true) >> 16 | rounded(high, 16, true); }

void multiply_fragments(bool bf16, float* sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragment f;
  std::memcpy(f.sum, sum, sizeof(f.sum));
  std::memcpy(f.a, a, sizeof(a));
  std::memcpy(f.b, b, sizeof(b));
  exchange(&f, sizeof(f), bf16 ? multiply_lanes<true> : multiply_lanes<false>);
  std::memcpy(sum, f.sum, sizeof(f.sum));
}

}  // namespace metaaug::cuda::emulation
