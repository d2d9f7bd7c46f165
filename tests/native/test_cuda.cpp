// The GPU engine's device code in the emulation, for sanitizers: random problems, whose results are the CPU engine's,
// whatever the order of threads and wherever the buffers lie; and what the emulation itself must find.
//
//   test_cuda [seed] [graphs]
#include "cuda/block.h"
#include "emulated.h"
#include "problems.h"

namespace {

using cuda::each;

// --- the emulation --------------------------------------------------------------------------------------------------

std::string error_of(int threads, int64_t shared, const std::function<void()>& kernel) {
  try {
    cuda::emulation::run(2, 1, threads, shared, kernel);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

// Reverses numbers in shared memory, with the barrier that this needs or without.
std::vector<int> reversed(bool barrier) {
  const int count = 96;
  std::vector<int> result(count);
  const auto kernel = [&] {
    int* shared = reinterpret_cast<int*>(cuda::shared_memory());
    shared[cuda::thread()] = cuda::thread();
    if (barrier) cuda::sync();
    result[cuda::thread()] = shared[count - 1 - cuda::thread()];
  };
  cuda::emulation::run(1, 1, count, count * sizeof(int), kernel);
  return result;
}

void check_emulation() {
  const std::vector<int> good = reversed(true), bad = reversed(false);
  for (int i = 0; i < int(good.size()); ++i) CHECK(good[i] == int(good.size()) - 1 - i, "%d at %d", good[i], i);
  CHECK(bad != good, "a missing barrier is not seen");

  std::vector<int> visits(2 * 3 * 64);
  cuda::emulation::run(2, 3, 64, 0, [&] { ++visits[cuda::team() * cuda::threads() + cuda::thread()]; });
  for (int each : visits) CHECK(each == 1, "%d visits", each);

  const auto some = [](int last) {
    return [=] {
      if (cuda::thread() < last) cuda::sync();
    };
  };
  CHECK(error_of(64, 0, some(64)).empty(), "a barrier that all reach");
  CHECK(error_of(64, 0, some(40)) ==
            "team 0: of 64 threads, 40 wait at a barrier, 0 at their block's, 0 in a warp's sum, and 24 have ended",
        "%s", error_of(64, 0, some(40)).c_str());
  const auto lanes = [] {
    if (cuda::thread() != 35) cuda::warp_sum(1.0);
  };
  CHECK(error_of(64, 0, lanes).find("31 in a warp's sum") != std::string::npos, "%s", error_of(64, 0, lanes).c_str());
  const auto beyond = [] {
    if (cuda::thread() == 3) *const_cast<volatile char*>(cuda::shared_memory() + 100) = 0;
  };
  CHECK(error_of(32, 100, beyond) == "team 0 wrote beyond its shared memory", "%s", error_of(32, 100, beyond).c_str());

  double unwritten = 0;
  cuda::emulation::run(1, 1, 32, 64, [&] {
    if (cuda::thread() == 0) unwritten = *reinterpret_cast<double*>(cuda::shared_memory());
  });
  CHECK(std::isnan(unwritten), "shared memory starts as %g", unwritten);

  for (const int threads : {32, 96, 256})
    for (const int members : {1, 3}) {
      const int all = members * threads;
      std::vector<double> sums(all), votes(all), scratch(all / 32 * 2), local(all);
      cuda::emulation::run(1, members, threads, 8 * threads, [&] {
        const int i = cuda::thread();
        double* shared = reinterpret_cast<double*>(cuda::shared_memory());
        shared[cuda::block_thread()] = i;
        if (cuda::member() != 1) cuda::block_sync();  // a block's own barrier is no other's
        if (cuda::member() != 1) local[i] = shared[threads - 1 - cuda::block_thread()];
        sums[i] = cuda::sum_all(double(i), scratch.data());
        sums[i] += 1e6 * cuda::sum_all(1.0, scratch.data() + all / 32);
        votes[i] = cuda::sync_or(i == 17) + 2 * cuda::sync_or(false);
      });
      for (int i = 0; i < all; ++i) {
        CHECK(sums[i] == (i < 32 ? all * (all - 1) / 2 + 1e6 * all : 0), "a sum of %g", sums[i]);
        CHECK(votes[i] == 1, "votes of %g", votes[i]);
        if (i / threads != 1) CHECK(local[i] == i / threads * threads + threads - 1 - i % threads, "%g", local[i]);
      }
    }
}

// --- what stands alone ----------------------------------------------------------------------------------------------

void check_divide() {
  for (int i = 0; i < 2000; ++i) {
    const int divisor = integer(1, i < 1000 ? 300 : 1 << 20);
    const cuda::Divide divide(divisor);
    for (const int n : {0, divisor - 1, divisor, integer(0, 1 << 16), integer(0, 0x7fffffff), 0x7fffffff}) {
      CHECK(divide(n) == n / divisor, "%d / %d is not %d", n, divisor, divide(n));
      CHECK(divide.rest(n, divide(n)) == n % divisor, "%d %% %d", n, divisor);
    }
  }
}

// Every image is full of its own number: images of a class are drawn without repetition, and copied whole.
void check_episodes() {
  const int classes = integer(2, 9), per_class = 4, size = integer(1, 40), tasks = integer(1, 5);
  Vector images(classes * per_class * size);
  for (size_t i = 0; i < images.size(); ++i) images[i] = double(i / size);
  std::vector<int64_t> first(classes), sizes(classes, per_class);
  for (int c = 0; c < classes; ++c) first[c] = c * per_class;
  cuda::Episodes<double> e;
  e.images = images.data();
  e.pixel = cuda::Pixel::kDouble;
  e.sample = size;
  e.classes = classes;
  e.first = first.data();
  e.sizes = sizes.data();
  e.key = generator();
  e.tasks = tasks;
  e.ways = integer(1, classes);
  e.shots = integer(1, 3);
  e.queries = per_class - e.shots;
  Vector x[2] = {Vector(tasks * e.ways * e.shots * size), Vector(tasks * e.ways * e.queries * size)};
  std::vector<int64_t> y[2] = {std::vector<int64_t>(tasks * e.ways * e.shots),
                               std::vector<int64_t>(tasks * e.ways * e.queries)};
  e.support_x = x[0].data();
  e.query_x = x[1].data();
  e.support_y = y[0].data();
  e.query_y = y[1].data();
  cuda::draw_episodes(e, nullptr);
  for (int task = 0; task < tasks; ++task) {
    std::map<int, int> drawn, class_of_way;
    for (int set = 0; set < 2; ++set) {
      const int count = e.ways * (set ? e.queries : e.shots);
      for (int i = task * count; i < (task + 1) * count; ++i) {
        const double* image = &x[set][int64_t{i} * size];
        CHECK(std::all_of(image, image + size, [&](double v) { return v == image[0]; }), "an image in parts");
        ++drawn[int(image[0])];
        const int way = int(y[set][i]), c = int(image[0]) / per_class;
        CHECK(class_of_way.emplace(way, c).first->second == c, "way %d is of two classes", way);
      }
    }
    CHECK(int(drawn.size()) == e.ways * per_class && int(class_of_way.size()) == e.ways, "images repeat");
  }
}

// --- the engine -----------------------------------------------------------------------------------------------------

void check_everything(const Problem& p) {
  const Problem single = rounded(p);
  const Values<double> expected = run(p, *cpu::make_engine<double>(p.graph));
  const Values<double> exact = run(single, *cpu::make_engine<double>(p.graph));
  const Problem stepwise = by_step(p);
  const Values<double> judged = run(stepwise, *cpu::make_engine<double>(p.graph), 1, false);
  for (const char* shared : {"1024", "200000"}) {  // by teams of blocks in the workspace, or by one in shared memory
    setenv("METAAUG_SHARED_BYTES", shared, 1);
    Emulated<double> engine(p.graph);
    const Values<double> found = run(p, engine);
    CHECK_CLOSE(found, expected, 1e-9);
    CHECK(same_bits(run(p, engine), found), "other bits with another order of threads");
    const Values<double> judged_here = run(stepwise, engine, 1, false);
    check_last(stepwise, judged_here);
    CHECK_CLOSE(judged_here, judged, 1e-9);
    Emulated<float> in_single(p.graph);
    CHECK_CLOSE(run(single, in_single), exact, 5e-3);
  }
}

void check_failure(Problem p) {
  if (p.adapt_only) return;
  Emulated<double> engine(p.graph);
  const Values<double> expected = run(p, engine);
  Vector& x = p.inputs["query_x"];
  const Vector good = x;
  std::fill(x.end() - p.graph.values[0].size(), x.end(), std::numeric_limits<double>::quiet_NaN());
  NonFinite failure;
  run(p, engine, 1, true, &failure);
  CHECK(failure.task == p.tasks - 1 && failure.query, "task %d, step %d: %s", failure.task, failure.step, failure.what);
  run(by_step(p), engine, 1, false, &failure);
  CHECK(failure.task == p.tasks - 1 && failure.query && failure.step == 0, "task %d, step %d: %s", failure.task,
        failure.step, failure.what);
  x = good;
  CHECK(same_bits(run(p, engine), expected), "a failed call has left something behind");
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned long long seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : std::random_device()();
  const int graphs = count > 2 ? std::atoi(arguments[2]) : 4;
  std::printf("seed %llu\n", seed);
  std::fflush(stdout);
  generator.seed(seed);
  widths = 8;  // fibers are slow
  check_emulation();
  check_divide();
  for (int i = 0; i < 20; ++i) check_episodes();
  for (int i = 0; i < graphs; ++i) {
    const Problem p = any_problem(i, i == 0 ? 7 : integer(1, 3));
    check_everything(p);
    check_failure(p);
  }
  std::printf("%d graphs\n", graphs);
}
