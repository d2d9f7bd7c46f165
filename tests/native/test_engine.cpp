// The engine without torch, for sanitizers: random graphs, whose gradients are compared with finite differences of
// the engine's own losses, between precisions, numbers of threads and instruction sets.
//
//   test_engine [seed] [graphs]
#include "one_task.h"
#include "problems.h"

namespace metaaug {
namespace baseline {
std::unique_ptr<cpu::Engine<double>> make_double(const Graph& graph);
}
namespace avx512 {
std::unique_ptr<cpu::Engine<double>> make_double(const Graph& graph);
std::unique_ptr<cpu::Engine<float>> make_float(const Graph& graph);
}  // namespace avx512
}  // namespace metaaug

namespace {

// Central differences of the loss along a random direction of each input. Where a step of the inner loop crosses a kink
// of relu or of max pooling, the loss jumps: what lies within one step size hardly lies within all.
void check_differences(Problem p, cpu::Engine<double>& engine) {
  const Values<double> found = run(p, engine);
  double largest = 0;
  for (const auto& input : p.inputs)
    if (found.count(input.first)) largest = std::max(largest, norm(found.at(input.first)));
  for (auto& [name, values] : p.inputs) {
    if (name == "parameters" && p.has("initial")) continue;
    const Vector direction = normals(values.size()), start = values, &gradient = found.at(name);
    double slope = 0, best = std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < values.size(); ++i) slope += gradient[i] * direction[i];
    for (double size : {1e-5, 1e-7, 1e-9}) {
      double losses[2];
      for (int side : {0, 1}) {
        for (size_t i = 0; i < values.size(); ++i) values[i] = start[i] + (side ? -size : size) * direction[i];
        losses[side] = loss(p, engine);
      }
      values = start;
      best = std::min(best, std::abs((losses[0] - losses[1]) / (2 * size) - slope));
    }
    CHECK(best <= 2e-5 * (norm(gradient) + 0.1 * largest), "%s: slope off by %.2g from %.2g", name.c_str(), best,
          slope);
  }
}

void check_everything(const Problem& p) {
  const std::unique_ptr<cpu::Engine<double>> engine = cpu::make_engine<double>(p.graph);
  const Values<double> expected = run(p, *engine);
  CHECK(same_bits(run(p, *engine, 3), expected), "three threads differ from one");
  CHECK(same_bits(run(p, *cpu::make_engine<double>(p.graph), 2), expected), "a new engine differs");
  CHECK_CLOSE(run(p, *baseline::make_double(p.graph)), expected, 1e-9);
  CHECK_CLOSE(run(p, *avx512::make_double(p.graph)), expected, 1e-9);
  check_differences(p, *engine);
  const Problem stepwise = by_step(p);
  const Values<double> judged = run(stepwise, *engine, 1, false);
  check_last(stepwise, judged);
  CHECK(same_bits(run(stepwise, *engine, 3, false), judged), "three threads differ from one by step");
  CHECK_CLOSE(run(stepwise, *baseline::make_double(p.graph), 1, false), judged, 1e-9);

  const Problem single = rounded(p);
  const Values<double> exact = run(single, *engine);
  const std::unique_ptr<cpu::Engine<float>> engines[] = {cpu::make_engine<float>(p.graph), avx512::make_float(p.graph)};
  for (const auto& each : engines) {
    const Values<float> found = run(single, *each);
    CHECK(same_bits(run(single, *each, 3), found), "three threads differ from one in float");
    CHECK_CLOSE(found, exact, 5e-3);
  }
}

bool drops(const Graph& graph) {
  return std::any_of(graph.ops.begin(), graph.ops.end(), [](const Op& op) { return op.kind == OpKind::kDropout; });
}

// Samples through the problem's weights and back, by the encoder or, `as_task`, as the only task's query set.
template <class T>
Values<T> encode(const Problem& p, const Vector& x, const Vector& mix, cpu::Engine<T>& engine, int workers,
                 uint64_t number, bool as_task = false) {
  const std::vector<T> theta(p.inputs.at("parameters").begin(), p.inputs.at("parameters").end());
  const std::vector<T> buffers(p.buffers.begin(), p.buffers.end()), data(x.begin(), x.end()),
      adjoint(mix.begin(), mix.end());
  const int64_t outputs = p.graph.values[p.graph.output].size(), samples = int64_t(mix.size()) / outputs;
  int64_t channels = 0;
  for (const Op& op : p.graph.ops)
    if (op.kind == OpKind::kBatchNorm) channels += p.graph.values[op.output].channels;
  Values<T> out;
  const auto asked = [&](const char* name, int64_t size) { return out[name].assign(size, T(0)), out[name].data(); };
  Encoding<T> call;
  call.samples = int(samples);
  call.x = data.data();
  const T* parameter = theta.data();
  for (const Parameter& each : p.graph.parameters) {
    call.parameters.push_back(parameter);
    parameter += each.size();
  }
  for (int at : p.buffer_at) call.buffers.push_back(buffers.data() + at);
  call.wanted = p.wanted;
  call.wants_x = true;
  call.number = number;
  Encoding<T> back = call;
  call.output = asked("output", samples * outputs);
  if (channels) call.statistics = asked("statistics", 2 * channels);
  back.adjoint = adjoint.data();
  back.grad_parameters = asked("parameters", theta.size());
  back.grad_x = asked("x", x.size());
  for (const Encoding<T>& each : {call, back})
    if (as_task)
      CHECK(engine.run(as_one_task(each), on_threads(workers)).task < 0, "not finite");
    else
      CHECK(engine.encode(each, on_threads(workers)), "stopped");
  return out;
}

void check_encoder(const Problem& p) {
  if (drops(p.graph)) return;
  const int samples = integer(2, 150);
  const Vector x = normals(samples * p.graph.values[0].size());
  const Vector mix = normals(samples * p.graph.values[p.graph.output].size());
  const std::unique_ptr<cpu::Engine<double>> engine = cpu::make_engine<double>(p.graph);
  const Values<double> expected = encode(p, x, mix, *engine, 1, 0, true), found = encode(p, x, mix, *engine, 1, 7);
  CHECK_CLOSE(found, expected, 1e-9);
  CHECK(same_bits(encode(p, x, mix, *engine, 3, 8), found), "three threads encode otherwise than one");
  CHECK(same_bits(encode(p, x, mix, *engine, 2, 0), found), "activations that are not kept come out otherwise");
  CHECK_CLOSE(encode(p, x, mix, *baseline::make_double(p.graph), 2, 1), expected, 1e-9);
  CHECK_CLOSE(encode(p, x, mix, *avx512::make_double(p.graph), 2, 1), expected, 1e-9);
}

// NaN in the last task's query is reported as such, and leaves nothing behind.
void check_failure(Problem p) {
  if (p.adapt_only) return;
  const std::unique_ptr<cpu::Engine<double>> engine = cpu::make_engine<double>(p.graph);
  const Values<double> expected = run(p, *engine);
  Vector& x = p.inputs["query_x"];
  const Vector good = x;
  std::fill(x.end() - p.graph.values[0].size(), x.end(), std::numeric_limits<double>::quiet_NaN());
  NonFinite failure;
  run(p, *engine, 2, true, &failure);
  CHECK(failure.task == p.tasks - 1 && failure.query, "task %d, step %d: %s", failure.task, failure.step, failure.what);
  run(by_step(p), *engine, 1, false, &failure);
  CHECK(failure.task == p.tasks - 1 && failure.query && failure.step == 0, "task %d, step %d: %s", failure.task,
        failure.step, failure.what);
  x = good;
  CHECK(same_bits(run(p, *engine), expected), "a failed call has left something behind");
}

void check_refusals() {
  Builder b({4});
  const int x = b.norm(OpKind::kBatchNorm, b.conv(0, 4));
  b.norm(OpKind::kLayerNorm, x);
  b.graph.ops[2].param[0] = b.graph.ops[1].param[0] = b.parameter({LayoutKind::kVector, 1, 4}, 1);
  bool refused = false;
  try {
    cpu::check(b.graph);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused, "one parameter in two layouts");
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned long long seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : std::random_device()();
  const int graphs = count > 2 ? std::atoi(arguments[2]) : 12;
  std::printf("seed %llu, instruction set %s\n", seed, cpu::instruction_set().c_str());
  std::fflush(stdout);
  generator.seed(seed);
  for (int i = 0; i < graphs; ++i) {
    const Problem p = any_problem(i, i == 0 ? 70 : integer(1, 3));
    check_everything(p);
    check_failure(p);
    check_encoder(p);
  }
  check_refusals();
  std::printf("%d graphs\n", graphs);
}
