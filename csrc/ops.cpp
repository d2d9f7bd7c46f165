#include "ops.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <chrono>
#include <limits>
#include <numeric>
#include <thread>

#include "cpu/pool.h"

#if defined(METAAUG_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace metaaug {
namespace {

int64_t flat_size(const Graph& graph) {
  int64_t size = 0;
  for (const Parameter& p : graph.parameters) size += p.size();
  return size;
}

int64_t normed_channels(const Graph& graph) {
  int64_t channels = 0;
  for (const Op& op : graph.ops)
    if (op.kind == OpKind::kBatchNorm) channels += graph.values[op.output].channels;
  return channels;
}

// The tensor's values as they are to be read: a view may be negated lazily, and a zero tensor has no memory at all.
at::Tensor in_memory(const at::Tensor& tensor) {
  return (tensor._is_zerotensor() ? tensor.clone() : tensor.resolve_neg()).contiguous();
}

}  // namespace

// Hands out contiguous tensors' pointers and keeps the tensors alive for the call.
class Pointers {
 public:
  Pointers(at::ScalarType dtype, at::Device device) : dtype_(dtype), device_(device) {}

  template <class T>
  const T* read(const OptionalTensor& tensor, const char* name, at::IntArrayRef shape) {
    if (!tensor) return nullptr;
    TORCH_CHECK_VALUE(tensor->sizes() == shape, name, " must have shape ", shape, " (got ", tensor->sizes(), ")");
    return read<T>(*tensor, name);
  }

  template <class T>
  const T* read(const at::Tensor& tensor, const char* name) {
    const auto wanted = std::is_same_v<T, int64_t> ? at::kLong : dtype_;
    TORCH_CHECK_VALUE(tensor.device() == device_, name, " must be on ", device_, " (got ", tensor.device(), ")");
    TORCH_CHECK_VALUE(tensor.scalar_type() == wanted, name, " must be ", wanted, " (got ", tensor.scalar_type(), ")");
    kept_.push_back(in_memory(tensor));
    return kept_.back().const_data_ptr<T>();
  }

 private:
  at::ScalarType dtype_;
  at::Device device_;
  std::vector<at::Tensor> kept_;
};

namespace {

// The stream of what is queued on a device, which is the current one meanwhile.
#if defined(METAAUG_CUDA)
struct OnDevice {
  explicit OnDevice(at::Device device) : guard(device) {}
  void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  c10::cuda::CUDAGuard guard;
};
#elif defined(METAAUG_EMULATION)
struct OnDevice {
  explicit OnDevice(at::Device) {}
  void* stream() const { return nullptr; }
};
#endif

// Memory for what an engine writes, which on a GPU nothing needs to clear.
at::Tensor to_be_written(at::IntArrayRef shape, const at::TensorOptions& options) {
#if defined(METAAUG_EMULATION)
  return at::full(shape, std::numeric_limits<double>::quiet_NaN(), options);
#else
  return options.device().is_cuda() ? at::empty(shape, options) : at::zeros(shape, options);
#endif
}

// As many threads as torch is set to use. The calling one polls for interrupts now and then, the others see what it
// found.
cpu::Parallel on_all_threads(const std::function<bool()>& poll, std::atomic<bool>& interrupted) {
  const int workers = at::get_num_threads();
  const auto caller = std::this_thread::get_id();
  auto polled = std::chrono::steady_clock::now();
  cpu::Parallel parallel;
  parallel.workers = workers;
  parallel.stopped = [=, &interrupted]() mutable {
    if (std::this_thread::get_id() != caller) return interrupted.load();
    const auto now = std::chrono::steady_clock::now();
    if (now - polled > std::chrono::milliseconds(20)) {
      polled = now;
      if (poll()) interrupted = true;
    }
    return interrupted.load();
  };
  parallel.run = [=](int count, const std::function<void(int, int)>& body) {
    cpu::Pool::instance().run(workers, count, body);
  };
  return parallel;
}

}  // namespace

template <class T>
cpu::Engine<T>& FusedEngine::on_cpu() {
  const std::lock_guard<std::mutex> lock(making_);
  auto& engine = engines<T>().cpu;
  if (!engine) engine = cpu::make_engine<T>(graph_);
  return *engine;
}

#if defined(METAAUG_CUDA) || defined(METAAUG_EMULATION)
template <class T>
cuda::Engine<T>& FusedEngine::on_gpu(int device, void* stream) {
  const std::lock_guard<std::mutex> lock(making_);
  auto& engine = engines<T>().cuda[device];
  if (!engine) engine = cuda::make_engine<T>(graph_, stream);
  return *engine;
}

template <class T>
NonFinite FusedEngine::run_cuda(const Call<T>& call, at::Device device) {
  const OnDevice current(device);
  std::vector<at::Tensor> memory;  // freed in the order of the stream
  const auto allocate = [&](int64_t bytes) {
    memory.push_back(at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device)));
    return memory.back().mutable_data_ptr();
  };
  return on_gpu<T>(device.index(), current.stream()).run(call, {current.stream(), allocate}, false);
}

cuda::Footprint FusedEngine::footprint(const Settings& settings, int samples, at::ScalarType dtype, int device) {
  const OnDevice current(at::Device(at::kCUDA, at::DeviceIndex(device)));
  void* const stream = current.stream();
  return dtype == at::kDouble ? on_gpu<double>(device, stream).footprint(settings, samples, stream)
                              : on_gpu<float>(device, stream).footprint(settings, samples, stream);
}
#else
template <class T>
NonFinite FusedEngine::run_cuda(const Call<T>&, at::Device device) {
  TORCH_CHECK_VALUE(false, "support_x must be on the CPU, for this build has no CUDA engine (got ", device, ")");
}

cuda::Footprint FusedEngine::footprint(const Settings&, int, at::ScalarType, int) {
  TORCH_CHECK_VALUE(false, "this build has no CUDA engine");
}
#endif

template <class T>
std::vector<const T*> FusedEngine::parameters_of(const std::vector<at::Tensor>& tensors, Pointers& pointers) const {
  std::vector<const T*> result;
  for (size_t p = 0; p < tensors.size(); ++p) {
    const int64_t size = graph_.parameters[p].size();
    TORCH_CHECK_VALUE(tensors[p].numel() == size, "parameter ", p, " must have ", size, " values (got ",
                      tensors[p].numel(), ")");
    result.push_back(pointers.read<T>(tensors[p], "parameters"));
  }
  return result;
}

template <class T>
std::map<std::string, at::Tensor> FusedEngine::encode_as(const EncoderInputs& in,
                                                         const std::vector<std::string>& outputs,
                                                         const std::function<bool()>& poll) {
  const at::TensorOptions options = in.x.options();
  const int64_t samples = in.x.size(0), outs = graph_.values[graph_.output].size();
  Pointers pointers(in.x.scalar_type(), in.x.device());
  Encoding<T> call;
  call.samples = int(samples);
  call.x = pointers.read<T>(in.x, "x");
  call.parameters = parameters_of<T>(in.parameters, pointers);
  for (const at::Tensor& buffer : in.buffers) call.buffers.push_back(pointers.read<T>(buffer, "buffers"));
  call.wanted.assign(in.wanted.begin(), in.wanted.end());
  call.wants_x = in.wants_x;
  call.number = in.number;
  if (in.adjoint) {
    TORCH_CHECK_VALUE(in.adjoint->numel() == samples * outs, "adjoint must have ", outs, " values a sample (got shape ",
                      in.adjoint->sizes(), ")");
    call.adjoint = pointers.read<T>(*in.adjoint, "adjoint");
  }
  std::map<std::string, at::Tensor> result;
  const auto output = [&](const char* name, T*& target, at::IntArrayRef shape) {
    if (std::find(outputs.begin(), outputs.end(), name) == outputs.end()) return;
    target = result.emplace(name, at::zeros(shape, options)).first->second.template mutable_data_ptr<T>();
  };
  output("output", call.output, {samples, outs});
  output("statistics", call.statistics, {2 * normed_channels(graph_)});
  output("grad_parameters", call.grad_parameters, {flat_size(graph_)});
  output("grad_x", call.grad_x, in.x.sizes());
  std::atomic<bool> interrupted{false};
  if (!on_cpu<T>().encode(call, on_all_threads(poll, interrupted))) return {};
  if (call.grad_parameters && !result.at("grad_parameters").isfinite().all().item<bool>())
    throw NonFiniteError{"the gradient of the model's parameters is not finite"};
  return result;
}

std::map<std::string, at::Tensor> FusedEngine::encode(const EncoderInputs& in, const std::vector<std::string>& outputs,
                                                      const std::function<bool()>& poll) {
  const int64_t sample = graph_.values[0].size();
  const size_t parameters = graph_.parameters.size();
  TORCH_CHECK_VALUE(in.x.device().is_cpu() && in.x.dim() > 0 && in.x.numel() == in.x.size(0) * sample && in.x.numel(),
                    "x must be [N, ...] on the CPU with ", sample, " values a sample (got ", in.x.sizes(), " on ",
                    in.x.device(), ")");
  TORCH_CHECK_VALUE(in.parameters.size() == parameters && in.wanted.size() == parameters,
                    "encode needs a value and wanted for each of ", parameters, " parameters");
  if (in.x.scalar_type() == at::kFloat) return encode_as<float>(in, outputs, poll);
  if (in.x.scalar_type() == at::kDouble) return encode_as<double>(in, outputs, poll);
  TORCH_CHECK_VALUE(false, "x must be float32 or float64 (got ", in.x.scalar_type(), ")");
}

template <class T>
std::map<std::string, at::Tensor> FusedEngine::run_as(const Settings& settings, const Inputs& in,
                                                      const std::vector<std::string>& outputs,
                                                      const std::function<bool()>& poll) {
  const at::ScalarType dtype = at::CppTypeToScalarType<T>::value;
  const int64_t flat = flat_size(graph_), parameters = int64_t(graph_.parameters.size());
  const int64_t outs = graph_.values[graph_.output].size(), sample = graph_.values[0].size();
  const at::Tensor& first = in.support_x ? *in.support_x : *in.query_x;
  const int64_t tasks = first.size(0);
  const at::Device device = first.device();
  const at::TensorOptions options = at::TensorOptions().dtype(dtype).device(device);
  Pointers pointers(dtype, device);

  Call<T> call;
  call.settings = settings;
  call.tasks = int(tasks);
  if (!in.initial) call.parameters = parameters_of<T>(in.parameters, pointers);
  const auto samples = [&](const OptionalTensor& x, const OptionalTensor& y, const char* name) {
    Samples<T> s;
    if (!x) return s;
    s.count = int(x->size(1));
    TORCH_CHECK_VALUE(x->size(0) == tasks && x->numel() == tasks * s.count * sample, name, "_x must be [", tasks,
                      ", N, ...] with ", sample, " values a sample (got ", x->sizes(), ")");
    s.x = pointers.read<T>(*x, name);
    if (y && y->scalar_type() == at::kLong) {
      s.ids = pointers.read<int64_t>(y, name, {tasks, s.count});
    } else if (y) {
      TORCH_CHECK_VALUE(y->numel() == tasks * s.count * outs, name, "_y must have ", outs,
                        " values a sample (got shape ", y->sizes(), ")");
      s.values = pointers.read<T>(*y, name);
    }
    return s;
  };
  call.support = samples(in.support_x, in.support_y, "support");
  call.query = samples(in.query_x, in.query_y, "query");
  call.support.weight = pointers.read<T>(in.support_weight, "sample_weight", {tasks, call.support.count});
  if (in.rows) {
    call.support.batch = int(in.rows->size(-1));
    call.support.rows = pointers.read<int64_t>(in.rows, "rows", {tasks, settings.steps, call.support.batch});
  }
  call.initial = pointers.read<T>(in.initial, "initial", {tasks, flat});
  call.step_weights = pointers.read<T>(in.step_weights, "step_weights", {settings.steps});
  call.task_weights = pointers.read<T>(in.task_weights, "task_weights", {tasks});
  call.flat_adjoint = pointers.read<T>(in.flat_adjoint, "flat_adjoint", {tasks, flat});
  if (in.prediction_adjoint) call.prediction_adjoint = pointers.read<T>(*in.prediction_adjoint, "prediction_adjoint");
  for (const at::Tensor& buffer : in.buffers) call.buffers.push_back(pointers.read<T>(buffer, "buffers"));
  int64_t rates_size = 0;
  for (int64_t p = 0; p < parameters; ++p) {
    const int64_t size = graph_.parameters[p].size();
    Rate<T> rate;
    if (in.rates[p]) {
      const int64_t steps = in.per_step[p] ? settings.steps : 1, values = in.rates[p]->numel();
      TORCH_CHECK_VALUE(values == steps || values == steps * size, "the rate of parameter ", p, " must have ", steps,
                        " or ", steps * size, " values (got ", values, ")");
      rate = {pointers.read<T>(*in.rates[p], "inner_lr"), in.per_step[p], values == steps * size && size > 1};
      rates_size += values;
    }
    call.rates.push_back(rate);
    call.wanted.push_back(in.wanted[p]);
  }

  std::map<std::string, at::Tensor> result;
  const auto output = [&](const char* name, T*& target, at::IntArrayRef shape, bool added_to = false) {
    if (std::find(outputs.begin(), outputs.end(), name) == outputs.end()) return;
    const at::Tensor tensor = added_to ? at::zeros(shape, options) : to_be_written(shape, options);
    target = result.emplace(name, tensor).first->second.template mutable_data_ptr<T>();
  };
  const auto like = [&](const char* name, T*& target, const OptionalTensor& tensor) {
    if (tensor) output(name, target, tensor->sizes(), true);
  };
  output("flat", call.flat, {tasks, flat});
  output("mean_displacement", call.mean_displacement, {flat});
  T* loss = nullptr;
  output("loss", loss, {});
  output("task_losses", call.task_losses, {tasks});
  output("step_losses", call.step_losses, {tasks, settings.steps});
  output("accuracy", call.accuracy, {tasks});
  output("losses_by_step", call.losses_by_step, {tasks, int64_t{settings.steps} + 1});
  output("accuracy_by_step", call.accuracy_by_step, {tasks, int64_t{settings.steps} + 1});
  output("predictions", call.predictions, {tasks, call.query.count, outs});
  output("statistics", call.statistics, {tasks, 2 * normed_channels(graph_)});
  output("grad_parameters", call.grad_parameters, {flat});
  output("grad_initial", call.grad_initial, {tasks, flat});
  output("grad_rates", call.grad_rates, {rates_size});
  like("grad_support_x", call.grad_support_x, in.support_x);
  like("grad_support_y", call.grad_support_y, in.support_y);
  like("grad_support_weight", call.grad_support_weight, in.support_weight);
  like("grad_query_x", call.grad_query_x, in.query_x);
  like("grad_query_y", call.grad_query_y, in.query_y);
  TORCH_CHECK_VALUE(!call.by_step() || !(call.reverse() || call.step_weights || call.prediction_adjoint),
                    "losses_by_step and accuracy_by_step must be asked for without gradients, step_weights and "
                    "prediction_adjoint (got ",
                    call.reverse()      ? "gradients"
                    : call.step_weights ? "step_weights"
                                        : "prediction_adjoint",
                    ")");

  std::atomic<bool> interrupted{false};
  NonFinite failure;
  if (device.is_cuda()) {
    failure = run_cuda(call, device);
    if (loss) at::mean_out(result.at("loss"), result.at("task_losses"), {0});
  } else {
    failure = on_cpu<T>().run(call, on_all_threads(poll, interrupted));
    if (interrupted) return {};
    if (loss) *loss = std::accumulate(call.task_losses, call.task_losses + tasks, T(0)) / T(tasks);
  }
  if (failure.task >= 0) {
    throw NonFiniteError{(failure.earlier ? "in an earlier call, task " : "task ") + std::to_string(failure.task) +
                         (failure.query ? ", query after step " : ", step ") + std::to_string(failure.step) + ": " +
                         failure.what + " is " +
                         (std::isnan(failure.value) ? "nan"
                          : failure.value > 0       ? "inf"
                                                    : "-inf")};
  }
  return result;
}

std::map<std::string, at::Tensor> FusedEngine::run(const Settings& settings, const Inputs& inputs,
                                                   const std::vector<std::string>& outputs,
                                                   const std::function<bool()>& poll) {
  TORCH_CHECK_VALUE(inputs.support_x || inputs.query_x, "a call needs support_x or query_x");
  const at::Tensor& x = inputs.support_x ? *inputs.support_x : *inputs.query_x;
  const size_t parameters = graph_.parameters.size();
  TORCH_CHECK_VALUE(inputs.rates.size() == parameters && inputs.per_step.size() == parameters &&
                        inputs.wanted.size() == parameters &&
                        (inputs.initial || inputs.parameters.size() == parameters),
                    "a call needs a rate, per_step, wanted and value for each of ", parameters, " parameters");
  if (x.scalar_type() == at::kFloat) return run_as<float>(settings, inputs, outputs, poll);
  if (x.scalar_type() == at::kDouble) return run_as<double>(settings, inputs, outputs, poll);
  TORCH_CHECK_VALUE(false, "support_x must be float32 or float64 (got ", x.scalar_type(), ")");
}

#if defined(METAAUG_CUDA) || defined(METAAUG_EMULATION)
namespace {

template <class T>
std::vector<at::Tensor> sample_as(const at::Tensor& images, const at::Tensor& first, const at::Tensor& sizes,
                                  cuda::Episodes<T> e) {
  const auto x = [&](int count) {
    std::vector<int64_t> shape = images.sizes().vec();
    shape[0] = e.ways * count;
    shape.insert(shape.begin(), e.tasks);
    return at::empty(shape, images.options().dtype(at::CppTypeToScalarType<T>::value));
  };
  const auto y = [&](int count) { return at::empty({e.tasks, e.ways * count}, images.options().dtype(at::kLong)); };
  const std::vector<at::Tensor> result = {x(e.shots), y(e.shots), x(e.queries), y(e.queries)};
  e.images = images.const_data_ptr();
  e.first = first.const_data_ptr<int64_t>();
  e.sizes = sizes.const_data_ptr<int64_t>();
  e.support_x = result[0].mutable_data_ptr<T>();
  e.support_y = result[1].mutable_data_ptr<int64_t>();
  e.query_x = result[2].mutable_data_ptr<T>();
  e.query_y = result[3].mutable_data_ptr<int64_t>();
  const OnDevice device(images.device());
  cuda::draw_episodes(e, device.stream());
  return result;
}

}  // namespace

std::vector<at::Tensor> sample_episodes(const at::Tensor& images, const at::Tensor& first, const at::Tensor& sizes,
                                        uint64_t key, int tasks, int ways, int shots, int queries,
                                        at::ScalarType dtype) {
  const auto pixel = [&] {
    if (images.scalar_type() == at::kByte) return cuda::Pixel::kByte;
    return images.scalar_type() == at::kFloat ? cuda::Pixel::kFloat : cuda::Pixel::kDouble;
  };
  const auto drawn = [&](auto e) {
    e.pixel = pixel();
    e.sample = images.numel() / std::max<int64_t>(images.size(0), 1);
    e.classes = first.numel();
    e.key = key;
    e.tasks = tasks;
    e.ways = ways;
    e.shots = shots;
    e.queries = queries;
    return sample_as(in_memory(images), in_memory(first), in_memory(sizes), e);
  };
  for (const at::Tensor& tensor : {first, sizes})
    TORCH_CHECK_VALUE(tensor.device() == images.device() && tensor.scalar_type() == at::kLong,
                      "first and sizes must be int64 on ", images.device(), " (got ", tensor.scalar_type(), " on ",
                      tensor.device(), ")");
  return dtype == at::kDouble ? drawn(cuda::Episodes<double>()) : drawn(cuda::Episodes<float>());
}
#else
std::vector<at::Tensor> sample_episodes(const at::Tensor& images, const at::Tensor&, const at::Tensor&, uint64_t, int,
                                        int, int, int, at::ScalarType) {
  TORCH_CHECK_VALUE(false, "images must be on the CPU, for this build has no CUDA engine (got ", images.device(), ")");
}
#endif

}  // namespace metaaug
