// The GPU engine's calls when they wait in a stream, as a GPU's do: a failure is told by a later call, and a graph's
// replays find what they were captured with. And sizes that 32 bits do not count.
//
//   test_queue [seed]
#include <sys/mman.h>

#include <cmath>
#include <deque>
#include <limits>
#include <string>

#include "check.h"
#include "cuda/executor.h"

namespace {

using namespace metaaug;
using Vector = std::vector<double>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// One linear layer, behind a dropout or not.
Graph linear(int inputs, int outputs, bool dropout = false) {
  Graph graph;
  graph.values.push_back({inputs});
  graph.parameters.push_back({LayoutKind::kMatrix, 1, outputs, inputs});
  const auto emit = [&](Op op, Shape shape) {
    op.input[0] = graph.output;
    op.output = graph.output = int(graph.values.size());
    graph.ops.push_back(op);
    graph.values.push_back(shape);
  };
  Op drop, multiply;
  drop.kind = OpKind::kDropout;
  drop.scalar[0] = 0.5;
  multiply.kind = OpKind::kConv2d;
  multiply.param[0] = 0;
  if (dropout) emit(drop, {inputs});
  emit(multiply, {outputs});
  return graph;
}

Vector numbers(int64_t size) {
  Vector result(size);
  for (double& value : result) value = std::uniform_real_distribution<double>(-1, 1)(generator);
  return result;
}

// A meta-step with random data, which lives as long as this.
struct MetaStep {
  MetaStep(const Graph& graph, int tasks, int samples)
      : weights(numbers(graph.parameters[0].size())),
        x(numbers(int64_t{tasks} * samples * graph.values[0].size())),
        y(numbers(int64_t{tasks} * samples * graph.values[graph.output].size())),
        losses(tasks),
        gradient(weights.size()) {
    call.settings.steps = 2;
    call.settings.loss = LossKind::kMse;
    call.tasks = tasks;
    call.parameters = {weights.data()};
    call.rates = {{&rate, false, false}};
    call.wanted = {1};
    call.support.count = call.query.count = samples;
    call.support.x = call.query.x = x.data();
    call.support.values = call.query.values = y.data();
    call.task_losses = losses.data();
    call.grad_parameters = gradient.data();
  }

  // As a call whose memory is never given back, for replays.
  NonFinite run(cuda::Engine<double>& engine, void* stream, bool wait = false) {
    const auto allocate = [&](int64_t bytes) -> void* {
      memory.emplace_back(size_t(bytes), char(0xff));
      return memory.back().data();
    };
    return engine.run(call, {stream, allocate}, wait);
  }

  Vector results() const {
    Vector all = losses;
    all.insert(all.end(), gradient.begin(), gradient.end());
    return all;
  }

  const double rate = 0.1;
  Vector weights, x, y, losses, gradient;
  Call<double> call;
  std::deque<std::vector<char>> memory;
};

template <class Error>
std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// `task` -1: none.
void expect(const NonFinite& found, int task, bool earlier = false) {
  CHECK(found.task == task && found.earlier == earlier, "task %d, not %d, %s: step %d: %s is %g", found.task, task,
        found.earlier ? "earlier" : "now", found.step, found.what, found.value);
}

// --- failures -------------------------------------------------------------------------------------------------------

void check_failures() {
  const Graph graph = linear(3, 2);
  const auto engine = cuda::make_engine<double>(graph);
  cuda::emulation::Stream stream;
  MetaStep good(graph, 5, 4), bad(graph, 4, 3), worse(graph, 2, 3), many(graph, integer(30, 300), 2);
  good.run(*engine, nullptr);
  const Vector expected = good.results();
  bad.x[2 * 9] = worse.x[0] = kNan;

  expect(bad.run(*engine, &stream), -1);
  expect(good.run(*engine, &stream), -1);  // queued before the GPU has come to the one before
  expect(many.run(*engine, &stream), -1);
  expect(worse.run(*engine, &stream), -1);
  stream.run();
  stream.queued.clear();
  expect(good.run(*engine, &stream), 2, true);  // the first call's, although a later one's is of an earlier task
  CHECK(stream.queued.size() <= 1, "%zu things are queued behind a failure", stream.queued.size());
  std::fill(good.losses.begin(), good.losses.end(), kNan);
  expect(good.run(*engine, &stream, true), -1);
  CHECK(good.results() == expected, "a failure has left something behind");

  expect(bad.run(*engine, &stream), -1);
  expect(good.run(*engine, &stream, true), 2, true);  // it waits for both
  expect(worse.run(*engine, &stream, true), 0);
  for (int i = 0; i < 70; ++i) expect(good.run(*engine, &stream), -1);
  expect(good.run(*engine, &stream, true), -1);
}

// --- graphs ---------------------------------------------------------------------------------------------------------

void check_captured() {
  const Graph graph = linear(3, 2);
  const auto engine = cuda::make_engine<double>(graph);
  cuda::emulation::Stream captured;
  captured.capturing = true;
  MetaStep step(graph, 3, 5);
  const auto capture = [&] { step.run(*engine, &captured, true); };
  const std::string early = error_of<std::invalid_argument>(capture);
  CHECK(early.find("must have run before it is captured in a CUDA graph") != std::string::npos, "%s", early.c_str());
  CHECK(captured.queued.empty(), "something is captured nevertheless");
  step.run(*engine, nullptr);
  const Vector expected = step.results();
  capture();
  for (int samples = 1; samples < 40; ++samples) MetaStep(graph, 2, samples).run(*engine, nullptr);  // other plans
  for (int replay = 0; replay < 2; ++replay) {
    std::fill(step.losses.begin(), step.losses.end(), kNan);
    captured.run();
    CHECK(step.results() == expected, "a replay gives other bits");
  }
  step.x[2 * 15] = kNan;
  captured.run();
  expect(MetaStep(graph, 2, 3).run(*engine, nullptr), 2, true);
}

// What is drawn by a key or a seed of the call would be drawn again by every replay.
void check_what_a_graph_would_repeat() {
  const Graph graph = linear(3, 2, true);
  const auto engine = cuda::make_engine<double>(graph);
  cuda::emulation::Stream captured;
  MetaStep step(graph, 3, 5);
  step.run(*engine, &captured);
  captured.run();
  captured.queued.clear();
  captured.capturing = true;
  const std::string dropout = error_of<std::invalid_argument>([&] { step.run(*engine, &captured); });
  CHECK(dropout.find("dropout") != std::string::npos && captured.queued.empty(), "%s", dropout.c_str());
  cuda::Episodes<double> episodes;
  episodes.ways = episodes.shots = episodes.queries = 1;
  const std::string drawn = error_of<std::invalid_argument>([&] { cuda::draw_episodes(episodes, &captured); });
  CHECK(drawn.find("episodes") != std::string::npos && captured.queued.empty(), "%s", drawn.c_str());
}

// --- sizes ----------------------------------------------------------------------------------------------------------

// A task whose support set has more than 2^31 values, of which a step sees few. Pages that nobody touches take nothing.
void check_large_support_sets() {
  const int inputs = 1 << 12, samples = 1 << 20;
  const size_t bytes = size_t{inputs} * samples * sizeof(double);
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(memory != MAP_FAILED, "no room for %zu bytes", bytes);
  const Graph graph = linear(inputs, 1);
  MetaStep small(graph, 1, 3), large(graph, 1, 3);
  const Vector targets(samples, 0.5);
  const std::vector<int64_t> rows = {0, samples - 1, samples / 2, samples - 1, 1, 2};
  double* const x = static_cast<double*>(memory);
  Vector seen;
  for (int64_t row : rows) {
    std::fill(x + row * inputs, x + (row + 1) * inputs, 0.001 * double(row % 7 + 1));
    seen.insert(seen.end(), x + row * inputs, x + (row + 1) * inputs);
  }
  std::vector<int64_t> in_order = {0, 1, 2, 3, 4, 5};
  large.weights = small.weights;
  for (MetaStep* step : {&small, &large}) {
    step->call.parameters = {step->weights.data()};
    step->call.query = {};
    step->call.task_losses = nullptr;
    step->call.grad_parameters = nullptr;
    step->call.support.batch = 3;
    step->call.support.count = step == &small ? 6 : samples;
    step->call.support.x = step == &small ? seen.data() : x;
    step->call.support.values = targets.data();
    step->call.support.rows = step == &small ? in_order.data() : rows.data();
    step->gradient.assign(inputs, 0);
    step->call.flat = step->gradient.data();
    step->run(*cuda::make_engine<double>(graph), nullptr, true);
  }
  CHECK(small.gradient == large.gradient, "rows beyond 2^31 values are read from elsewhere");
  munmap(memory, bytes);

  cuda::Episodes<float> episodes;
  episodes.ways = episodes.shots = 1 << 6;
  episodes.sample = 1 << 20;
  const std::string error = error_of<std::invalid_argument>([&] { cuda::draw_episodes(episodes, nullptr); });
  CHECK(error.find("1073741824") != std::string::npos, "%s", error.c_str());
}

void check_large_pictures() {
  for (const Pair side : {Pair{1, 1 << 14}, Pair{(1 << 14) - 20, 2}, Pair{100, 100}}) {
    Graph graph = linear(1, 1);
    graph.values[0].height = graph.values[1].height = side.y;
    graph.values[0].width = graph.values[1].width = side.x;
    graph.ops[0].kernel = {3, 3};
    graph.ops[0].padding = {1, 1};
    const std::string error = error_of<std::invalid_argument>([&] { cuda::check(graph); });
    CHECK(error.empty() == (side.x < 1 << 14), "%d x %d: %s", side.y, side.x, error.c_str());
  }
}

// Rates are counted in 32 bits, and a failure's step in 28.
void check_large_settings() {
  const Graph graph = linear(1 << 12, 1);
  const auto engine = cuda::make_engine<double>(graph);
  MetaStep step(graph, 1, 3);
  const auto refusal = [&] { return error_of<std::invalid_argument>([&] { step.run(*engine, nullptr); }); };
  step.call.settings.steps = 1 << 19;
  step.call.rates[0].per_step = step.call.rates[0].per_element = true;
  CHECK(refusal().find("values of inner_lr (got 2147483648)") != std::string::npos, "%s", refusal().c_str());
  step.call.settings.steps = 1 << 28;
  step.call.rates[0].per_step = false;
  CHECK(refusal().find("steps (got 268435456)") != std::string::npos, "%s", refusal().c_str());
}

// Every theta_k begins where 16 bytes can be read at once.
void check_path() {
  for (int flat = 1; flat < 20; ++flat) {
    cuda::Arguments<float> a{};
    a.flat = flat;
    a.steps = 3;
    a.keep_path = true;
    const cuda::Regions r = cuda::Layout(a, 1, 0).regions;
    CHECK(r.path % 4 == 0 && r.path_stride % 4 == 0 && r.path_stride >= flat, "%d: %d", flat, int(r.path_stride));
  }
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned long long seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : std::random_device()();
  std::printf("seed %llu\n", seed);
  std::fflush(stdout);
  generator.seed(seed);
  for (const char* shared : {"1024", "200000"}) {
    setenv("METAAUG_SHARED_BYTES", shared, 1);
    check_failures();
    check_captured();
  }
  check_what_a_graph_would_repeat();
  check_large_support_sets();
  check_large_pictures();
  check_large_settings();
  check_path();
  std::printf("done\n");
}
