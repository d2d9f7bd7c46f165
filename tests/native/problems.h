// Random problems for programs that test engines without torch, how an engine runs one, and comparisons of results.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/engine.h"
#include "cpu/pool.h"

namespace {

using namespace metaaug;
using Vector = std::vector<double>;

// --- random numbers -------------------------------------------------------------------------------------------------

bool coin() { return integer(0, 1); }
double normal() { return std::normal_distribution<double>()(generator); }
int widths = 9;  // how many of these there are
int width() { return std::vector<int>{1, 3, 4, 5, 8, 9, 17, 35, 67}[integer(0, widths - 1)]; }

Vector normals(int64_t size, double scale = 1, double mean = 0) {
  Vector result(size);
  for (double& x : result) x = mean + scale * normal();
  return result;
}

Vector uniforms(int64_t size, double low, double high) {
  Vector result(size);
  for (double& x : result) x = std::uniform_real_distribution<double>(low, high)(generator);
  return result;
}

// --- random graphs --------------------------------------------------------------------------------------------------

// Appends ops; every method takes a value's index and returns that of its result.
struct Builder {
  Graph graph;
  Vector parameters, buffers;  // values of all, in their order
  int sites = 0;

  explicit Builder(Shape input) { graph.values.push_back(input); }

  const Shape& shape(int value) const { return graph.values[value]; }

  int parameter(Parameter p, double scale, double mean = 0) {
    const Vector values = normals(p.size(), scale, mean);
    parameters.insert(parameters.end(), values.begin(), values.end());
    graph.parameters.push_back(p);
    return int(graph.parameters.size()) - 1;
  }

  int emit(Op op, int input, Shape shape) {
    op.input[0] = input;
    op.output = int(graph.values.size());
    graph.values.push_back(shape);
    graph.ops.push_back(op);
    return graph.output = op.output;
  }

  static int windows(int size, int kernel, int stride, int padding, int dilation) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  }

  // A weight and a bias may be those of an earlier op (`like`).
  int conv(int input, int outputs, Op op = {}, const Op* like = nullptr) {
    const Shape& in = shape(input);
    op.kind = OpKind::kConv2d;
    const int inputs = in.channels;
    if (like) {
      op.param[0] = like->param[0], op.param[1] = like->param[1];
    } else {
      const double scale = 1 / std::sqrt(double(inputs * op.kernel.y * op.kernel.x));
      op.param[0] = parameter({LayoutKind::kMatrix, 1, outputs, inputs, op.kernel}, scale);
      if (coin()) op.param[1] = parameter({LayoutKind::kVector, 1, outputs}, 0.1);
    }
    return emit(op, input,
                {outputs, windows(in.height, op.kernel.y, op.stride.y, op.padding.y, op.dilation.y),
                 windows(in.width, op.kernel.x, op.stride.x, op.padding.x, op.dilation.x)});
  }

  int norm(OpKind kind, int input, bool frozen = false, int rows = 1) {
    const Shape in = shape(input);
    Op op;
    op.kind = kind;
    op.eps = 0.01;
    if (kind == OpKind::kGroupNorm) op.groups = in.channels % 3 == 0 ? 3 : 1;
    const bool picture = kind == OpKind::kLayerNorm;
    const Parameter p{picture ? LayoutKind::kPicture : LayoutKind::kVector, rows, in.channels, 1,
                      picture ? Pair{in.height, in.width} : Pair{}};
    if (rows > 1 || coin()) {
      op.param[0] = parameter(p, 0.3, 1);
      op.param[1] = parameter(p, 0.3);
    }
    if (frozen) {
      op.buffer[0] = int(buffers.size()), op.buffer[1] = op.buffer[0] + in.channels;  // offsets, for now
      for (double x : normals(in.channels, 0.3)) buffers.push_back(x);
      for (double x : uniforms(in.channels, 0.5, 2)) buffers.push_back(x);
    }
    return emit(op, input, in);
  }

  int elementwise(OpKind kind, int input) {
    Op op;
    op.kind = kind;
    if (kind == OpKind::kLeakyRelu) op.scalar[0] = 0.2;
    if (kind == OpKind::kSoftplus) op.scalar[0] = 2, op.scalar[1] = 3;
    if (kind == OpKind::kDropout) op.scalar[0] = 0.3, op.site = sites++;
    return emit(op, input, shape(input));
  }

  int pool(OpKind kind, int input, Pair kernel, Pair stride, Pair padding) {
    const Shape in = shape(input);
    Op op;
    op.kind = kind;
    op.kernel = kernel, op.stride = stride, op.padding = padding;
    op.count_padding = coin();
    return emit(op, input,
                {in.channels, windows(in.height, kernel.y, stride.y, padding.y, 1),
                 windows(in.width, kernel.x, stride.x, padding.x, 1)});
  }

  int add(int a, int b) {
    Op op;
    op.kind = OpKind::kAdd;
    op.input[1] = b;
    return emit(op, a, shape(a));
  }

  int mean(int input) {
    Op op;
    op.kind = OpKind::kMeanPool;
    return emit(op, input, {shape(input).channels});
  }

  int flatten(int input) {
    Op op;
    op.kind = OpKind::kFlatten;
    return emit(op, input, {int(shape(input).size())});
  }
};

OpKind any_activation() {
  return std::vector<OpKind>{OpKind::kRelu, OpKind::kLeakyRelu, OpKind::kGelu,    OpKind::kGeluTanh,
                             OpKind::kTanh, OpKind::kSigmoid,   OpKind::kSoftplus}[integer(0, 6)];
}

Builder perceptron() {
  Builder b({integer(1, 9)});
  int x = 0;
  for (int depth = integer(1, 3); depth > 0; --depth) {
    x = b.conv(x, width());
    if (coin()) x = b.norm(coin() ? OpKind::kBatchNorm : OpKind::kLayerNorm, x);
    x = b.elementwise(any_activation(), x);
  }
  b.conv(x, integer(1, 6));
  return b;
}

Op window(int kernel, int stride, int padding, int dilation) {
  Op op;
  op.kernel = {kernel, integer(1, kernel)};
  op.stride = {stride, 1};
  op.padding = {integer(0, padding), padding};
  op.dilation = {dilation, dilation};
  return op;
}

// Two convolutions with norms and pools between, per-step or frozen batch norms, dropout.
Builder convolutional(int per_step_rows) {
  Builder b({integer(1, 3), integer(7, 8), integer(4, 6)});
  int x = b.conv(0, width(), window(3, integer(1, 2), 1, 1));
  x = per_step_rows > 1 ? b.norm(OpKind::kBatchNorm, x, false, per_step_rows)
                        : b.norm(coin() ? OpKind::kBatchNorm : OpKind::kGroupNorm, x);
  x = b.elementwise(any_activation(), x);
  x = b.pool(coin() ? OpKind::kMaxPool : OpKind::kAvgPool, x, {2, 3}, {1, 2}, {integer(0, 1), 1});
  if (coin()) x = b.elementwise(OpKind::kDropout, x);
  x = b.conv(x, width(), window(integer(1, 2), integer(1, 3), 0, 1));
  x = coin() ? b.norm(OpKind::kLayerNorm, x) : b.norm(OpKind::kBatchNorm, x, coin());
  x = b.elementwise(any_activation(), x);
  b.conv(coin() ? b.flatten(x) : b.mean(x), integer(2, 5));
  return b;
}

// A shared convolution, values with several readers, and sums of them.
Builder residual() {
  Builder b({integer(1, 3), 4, 4});
  const int channels = width();
  const Op same = window(3, 1, 1, 1);
  Op square = same;
  square.kernel = {3, 3}, square.padding = {1, 1};
  const int stem = b.conv(0, channels, square);
  int x = b.conv(stem, channels, square);
  const Op shared = b.graph.ops.back();
  x = b.elementwise(OpKind::kTanh, b.norm(OpKind::kBatchNorm, x));
  x = b.conv(x, channels, square, &shared);
  x = b.add(x, stem);
  x = b.add(b.elementwise(OpKind::kRelu, x), b.pool(OpKind::kMaxPool, x, {3, 3}, {1, 1}, {1, 1}));
  x = b.add(x, x);
  b.conv(b.mean(x), integer(2, 4));
  return b;
}

// --- calls ----------------------------------------------------------------------------------------------------------

// A call's settings, and its inputs by name as numbers in double precision.
struct Problem {
  Graph graph;
  Settings settings;
  int tasks = 0, supports = 0, queries = 0, batch = 0;
  std::map<std::string, Vector> inputs;
  std::vector<int64_t> support_ids, query_ids, rows;
  Vector buffers;
  std::vector<int> buffer_at;
  std::vector<Rate<double>> rates;  // data is not used
  std::vector<char> moves, wanted;
  bool adapt_only = false;  // theta_K and an adjoint of it, instead of a query
  bool by_step = false;     // judged before every step too, and not weighted by steps

  bool has(const std::string& name) const { return inputs.count(name) > 0; }
  int64_t rate_size(int p) const {
    return (rates[p].per_step ? settings.steps : 1) * (rates[p].per_element ? graph.parameters[p].size() : 1);
  }
};

Problem problem(Builder b, LossKind loss, int tasks) {
  Problem p;
  p.settings.loss = loss;
  p.settings.steps = integer(0, 3);
  p.settings.seed = uint32_t(generator());
  if (coin()) p.settings.momentum = 0.6;
  if (coin()) p.settings.weight_decay = 0.1;
  if (loss == LossKind::kCrossEntropy && coin()) p.settings.label_smoothing = 0.2;
  p.tasks = tasks;
  p.supports = integer(3, 6);
  p.queries = integer(3, 5);
  for (Op& op : b.graph.ops)
    for (int& buffer : op.buffer)
      if (buffer >= 0) {
        p.buffer_at.push_back(buffer);
        buffer = int(p.buffer_at.size()) - 1;
      }
  p.buffers = b.buffers;
  p.graph = b.graph;
  const int64_t flat = b.parameters.size(), sample = b.shape(0).size(), outputs = b.shape(b.graph.output).size();
  p.inputs["parameters"] = b.parameters;
  if (coin()) p.inputs["initial"] = normals(tasks * flat, 0.3);
  p.inputs["support_x"] = normals(tasks * p.supports * sample);
  p.inputs["query_x"] = normals(tasks * p.queries * sample);
  if (coin()) p.inputs["support_weight"] = uniforms(tasks * p.supports, 0.5, 1.5);
  if (loss == LossKind::kCrossEntropy && coin()) {
    for (int i = 0; i < tasks * p.supports; ++i) p.support_ids.push_back(integer(0, int(outputs) - 1));
    for (int i = 0; i < tasks * p.queries; ++i) p.query_ids.push_back(integer(0, int(outputs) - 1));
  } else {
    p.inputs["support_y"] = uniforms(tasks * p.supports * outputs, 0, 1);
    p.inputs["query_y"] = uniforms(tasks * p.queries * outputs, 0, 1);
  }
  if (coin()) {
    p.batch = integer(3, 5);
    for (int i = 0; i < tasks * p.settings.steps * p.batch; ++i) p.rows.push_back(integer(0, p.supports - 1));
  }
  if (p.settings.steps > 0 && coin()) p.inputs["step_weights"] = normals(p.settings.steps);
  Vector& rates = p.inputs["rates"];
  const double fastest = loss == LossKind::kMse ? 0.001 : 0.02;  // slow enough to stay clear of chaos
  for (const Parameter& parameter : p.graph.parameters) {
    p.moves.push_back(parameter.rows == 1 && integer(0, 4) > 0);
    p.wanted.push_back(1);
    p.rates.push_back({nullptr, coin(), parameter.size() > 1 && coin()});
    if (!p.moves.back()) continue;
    for (double x : uniforms(p.rate_size(int(p.rates.size()) - 1), 0, fastest)) rates.push_back(x);
  }
  if (rates.empty()) p.inputs.erase("rates");
  p.adapt_only = integer(0, 4) == 0;
  if (p.adapt_only) {
    for (const char* name : {"query_x", "query_y", "step_weights"}) p.inputs.erase(name);
    p.inputs["adjoint"] = normals(tasks * flat);  // of theta_K; the loss is their product
  }
  return p;
}

// Every kind of network; of 12 with every loss.
Problem any_problem(int i, int tasks) {
  const LossKind loss = std::vector<LossKind>{LossKind::kCrossEntropy, LossKind::kMse, LossKind::kBce}[(i + i / 4) % 3];
  switch (i % 4) {
    case 0:
      return problem(perceptron(), loss, tasks);
    case 1:
      return problem(residual(), loss, tasks);
    case 2:
      return problem(convolutional(1), loss, tasks);
    default:
      return problem(convolutional(integer(2, 3)), loss, tasks);
  }
}

cpu::Parallel on_threads(int workers) {
  cpu::Parallel parallel;
  parallel.workers = workers;
  parallel.run = [workers](int count, const std::function<void(int, int)>& body) {
    cpu::Pool::instance().run(workers, count, body);
  };
  return parallel;
}

template <class T>
using Values = std::map<std::string, std::vector<T>>;

// Every output of a call by name; gradients have the names of the inputs. Without `reverse` the losses alone.
template <class T>
Values<T> run(const Problem& p, cpu::Engine<T>& engine, int workers = 1, bool reverse = true,
              NonFinite* expected = nullptr) {
  const Settings& s = p.settings;
  Values<T> in, out;
  for (const auto& [name, values] : p.inputs) in[name].assign(values.begin(), values.end());
  const auto given = [&](const char* name) { return p.has(name) ? in[name].data() : nullptr; };
  const auto asked = [&](const char* name, int64_t size) { return out[name].assign(size, T(0)), out[name].data(); };
  Call<T> call;
  call.settings = s;
  call.tasks = p.tasks;
  call.initial = given("initial");
  const T* parameter = in["parameters"].data();
  const T* rate = given("rates");
  for (size_t i = 0; i < p.graph.parameters.size(); ++i) {
    if (!call.initial) call.parameters.push_back(parameter);
    parameter += p.graph.parameters[i].size();
    call.rates.push_back({p.moves[i] ? rate : nullptr, p.rates[i].per_step, p.rates[i].per_element});
    if (p.moves[i]) rate += p.rate_size(int(i));
    call.wanted.push_back(p.wanted[i]);
  }
  const std::vector<T> buffers(p.buffers.begin(), p.buffers.end());
  for (int at : p.buffer_at) call.buffers.push_back(buffers.data() + at);
  call.support = {p.supports,
                  given("support_x"),
                  p.support_ids.empty() ? nullptr : p.support_ids.data(),
                  given("support_y"),
                  given("support_weight"),
                  p.batch ? p.rows.data() : nullptr,
                  p.batch};
  const int64_t flat = p.inputs.at("parameters").size();
  if (p.adapt_only) {
    call.flat = asked("flat", p.tasks * flat);
    if (reverse) call.flat_adjoint = given("adjoint");
  } else {
    call.query = {p.queries, given("query_x"), p.query_ids.empty() ? nullptr : p.query_ids.data(), given("query_y")};
    call.step_weights = given("step_weights");
    call.task_losses = asked("task_losses", p.tasks);
    call.predictions = asked("predictions", p.tasks * p.queries * p.graph.values[p.graph.output].size());
    if (call.step_weights) call.step_losses = asked("step_losses", int64_t{p.tasks} * s.steps);
    if (!p.query_ids.empty()) call.accuracy = asked("accuracy", p.tasks);
    const int64_t judged = p.tasks * (int64_t{s.steps} + 1);
    if (p.by_step) call.losses_by_step = asked("losses_by_step", judged);
    if (p.by_step && call.accuracy) call.accuracy_by_step = asked("accuracy_by_step", judged);
  }
  if (reverse) {
    if (call.initial)
      call.grad_initial = asked("initial", p.tasks * flat);
    else
      call.grad_parameters = asked("parameters", flat);
    const std::pair<const char*, T * Call<T>::*> gradients[] = {
        {"rates", &Call<T>::grad_rates},         {"support_x", &Call<T>::grad_support_x},
        {"support_y", &Call<T>::grad_support_y}, {"support_weight", &Call<T>::grad_support_weight},
        {"query_x", &Call<T>::grad_query_x},     {"query_y", &Call<T>::grad_query_y}};
    for (const auto& [name, target] : gradients)
      if (p.has(name)) call.*target = asked(name, in[name].size());
  }
  const NonFinite failure = engine.run(call, on_threads(workers));
  if (expected) return *expected = failure, out;
  CHECK(failure.task < 0, "task %d, step %d: %s is %g", failure.task, failure.step, failure.what, failure.value);
  if (reverse && call.step_weights) {
    T* gradient = asked("step_weights", s.steps);
    for (int i = 0; i < p.tasks * s.steps; ++i) gradient[i % s.steps] += call.step_losses[i] / T(p.tasks);
  }
  if (reverse && p.adapt_only) out["adjoint"] = out["flat"];
  return out;
}

double loss(const Problem& p, cpu::Engine<double>& engine) {
  const Values<double> out = run(p, engine, 1, false);
  double total = 0;
  if (p.adapt_only)
    for (size_t i = 0; i < out.at("flat").size(); ++i) total += out.at("flat")[i] * p.inputs.at("adjoint")[i];
  else
    for (double each : out.at("task_losses")) total += each / p.tasks;
  return total;
}

// --- comparisons ----------------------------------------------------------------------------------------------------

template <class T>
double norm(const std::vector<T>& values) {
  double total = 0;
  for (T value : values) total += double(value) * double(value);
  return std::sqrt(total);
}

// The largest difference of a pair of vectors, relative to the second, or to a share of the largest where it is small.
template <class A, class B>
double distance(const Values<A>& got, const Values<B>& expected, std::string* where) {
  double largest = 0, worst = 0;
  for (const auto& [name, values] : expected) largest = std::max(largest, norm(values));
  CHECK(got.size() == expected.size(), "%zu and %zu outputs", got.size(), expected.size());
  for (const auto& [name, values] : expected) {
    const std::vector<A>& other = got.at(name);
    CHECK(other.size() == values.size(), "%s", name.c_str());
    Vector difference(values.size());
    for (size_t i = 0; i < values.size(); ++i) difference[i] = double(other[i]) - double(values[i]);
    const double error = norm(difference) / std::max(norm(values), 1e-3 * largest);
    if (!(error <= worst)) worst = error, *where = name;
  }
  return worst;
}

#define CHECK_CLOSE(got, expected, tolerance)                             \
  do {                                                                    \
    std::string where;                                                    \
    const double error = distance(got, expected, &where);                 \
    CHECK(error < tolerance, "%s differs by %.2g", where.c_str(), error); \
  } while (false)

template <class T>
bool same_bits(const Values<T>& a, const Values<T>& b) {
  if (a.size() != b.size()) return false;
  for (const auto& [name, values] : a)
    if (std::memcmp(values.data(), b.at(name).data(), values.size() * sizeof(T)) != 0) return false;
  return true;
}

// Of what is judged by step, the last is what is judged at the end.
void check_last(const Problem& p, const Values<double>& found) {
  for (const auto& [name, last] :
       {std::pair("losses_by_step", "task_losses"), std::pair("accuracy_by_step", "accuracy")})
    for (int task = 0; found.count(name) && task < p.tasks; ++task) {
      const double judged = found.at(name)[task * (p.settings.steps + 1) + p.settings.steps];
      CHECK(judged == found.at(last)[task], "%s of task %d: %g", name, task, judged);
    }
}

// A problem to be judged by step, if it has a query.
Problem by_step(Problem p) {
  p.by_step = !p.adapt_only;
  p.inputs.erase("step_weights");
  return p;
}

// The numbers of a problem as float has them.
Problem rounded(Problem p) {
  for (auto& [name, values] : p.inputs)
    for (double& value : values) value = float(value);
  for (double& value : p.buffers) value = float(value);
  return p;
}

}  // namespace
