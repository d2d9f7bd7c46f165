// Where torch meets the engine: validate, allocate, route to a device, release the GIL.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>

#include "cpu/engine.h"
#include "cuda/engine.h"

namespace metaaug {

using OptionalTensor = std::optional<at::Tensor>;

// Tensors of one call, as in Call; `y` is int64 class ids or floating-point targets.
struct Inputs {
  std::vector<at::Tensor> parameters;  // one for each of the graph's; empty with `initial`
  std::vector<at::Tensor> buffers;
  std::vector<OptionalTensor> rates;  // one for each parameter, null where it does not move
  std::vector<bool> per_step, wanted;
  OptionalTensor support_x, support_y, support_weight, rows, initial;
  OptionalTensor query_x, query_y, step_weights, task_weights;
  OptionalTensor flat_adjoint, prediction_adjoint;
};

// Tensors of one Encoding.
struct EncoderInputs {
  at::Tensor x;
  std::vector<at::Tensor> parameters, buffers;
  std::vector<bool> wanted;
  bool wants_x = false;
  OptionalTensor adjoint;
  uint64_t number = 0;
};

class Pointers;

// Whether this build has the CUDA engine.
#if defined(METAAUG_CUDA)
inline constexpr bool kCuda = true;
#else
inline constexpr bool kCuda = false;
#endif

class FusedEngine {
 public:
  // Throws std::invalid_argument where the engine of that kind of device cannot run the graph.
  FusedEngine(Graph graph, bool on_gpu) : graph_(std::move(graph)) {
    on_gpu ? cuda::check(graph_) : cpu::check(graph_);
  }

  // Computes, on the device of the data, the outputs named in `outputs`: those of Call, and `loss`, the mean of
  // `task_losses`. `poll` is called between steps on the calling thread; true stops the run. A run on a GPU is queued
  // on the current stream and never stopped.
  std::map<std::string, at::Tensor> run(const Settings& settings, const Inputs& inputs,
                                        const std::vector<std::string>& outputs, const std::function<bool()>& poll);

  // The outputs of Encoding named in `outputs`, on the CPU.
  std::map<std::string, at::Tensor> encode(const EncoderInputs& inputs, const std::vector<std::string>& outputs,
                                           const std::function<bool()>& poll);

  // See cuda::Engine; for float32 or float64 on a GPU.
  cuda::Footprint footprint(const Settings& settings, int samples, at::ScalarType dtype, int device);

 private:
  // Engines for one type; a GPU has one of its own.
  template <class T>
  struct Engines {
    std::unique_ptr<cpu::Engine<T>> cpu;
    std::map<int, std::unique_ptr<cuda::Engine<T>>> cuda;
  };

  template <class T>
  Engines<T>& engines() {
    return std::get<Engines<T>>(engines_);
  }
  template <class T>
  std::map<std::string, at::Tensor> run_as(const Settings& settings, const Inputs& inputs,
                                           const std::vector<std::string>& outputs, const std::function<bool()>& poll);
  template <class T>
  std::map<std::string, at::Tensor> encode_as(const EncoderInputs& inputs, const std::vector<std::string>& outputs,
                                              const std::function<bool()>& poll);
  // One for each of the graph's.
  template <class T>
  std::vector<const T*> parameters_of(const std::vector<at::Tensor>& tensors, Pointers& pointers) const;
  template <class T>
  NonFinite run_cuda(const Call<T>& call, at::Device device);
  template <class T>
  cuda::Engine<T>& on_gpu(int device, void* stream);
  template <class T>
  cpu::Engine<T>& on_cpu();

  Graph graph_;
  std::tuple<Engines<float>, Engines<double>> engines_;  // made by the first call that needs them
  std::mutex making_;
};

// Draws tasks from images [N, ...] that lie on a GPU, grouped by class: class c has sizes[c] of them from first[c] on.
// `key` is the batch's, see metaaug_fast/data/draws.py. Gives support x and y, query x and y.
std::vector<at::Tensor> sample_episodes(const at::Tensor& images, const at::Tensor& first, const at::Tensor& sizes,
                                        uint64_t key, int tasks, int ways, int shots, int queries,
                                        at::ScalarType dtype);

// Thrown when NaN or infinity arises; bindings turn it into metaaug_fast.NonFiniteError.
struct NonFiniteError {
  std::string message;
};

}  // namespace metaaug
