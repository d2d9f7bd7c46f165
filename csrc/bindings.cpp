#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "ops.h"

#ifndef METAAUG_WHY_NO_CUDA  // what setup.py missed for a CUDA engine
#define METAAUG_WHY_NO_CUDA ""
#endif

namespace py = pybind11;
using namespace metaaug;

// What body(poll) returns, where `poll` looks for signals.
template <class Body>
static std::map<std::string, at::Tensor> without_gil(const Body& body) {
  bool interrupted = false;
  const auto poll = [&] {
    const py::gil_scoped_acquire gil;
    return interrupted = PyErr_CheckSignals() != 0;
  };
  std::map<std::string, at::Tensor> result;
  {
    const py::gil_scoped_release release;
    result = body(poll);
  }
  if (interrupted) throw py::error_already_set();
  return result;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The fused engine of metaaug_fast.";
  static py::object non_finite = py::module_::import("metaaug_fast.errors").attr("NonFiniteError");
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(error);
    } catch (const NonFiniteError& e) {
      PyErr_SetString(non_finite.ptr(), e.message.c_str());
    }
  });

  py::enum_<OpKind>(m, "OpKind", py::module_local())
      .value("conv2d", OpKind::kConv2d)
      .value("batch_norm", OpKind::kBatchNorm)
      .value("layer_norm", OpKind::kLayerNorm)
      .value("group_norm", OpKind::kGroupNorm)
      .value("relu", OpKind::kRelu)
      .value("leaky_relu", OpKind::kLeakyRelu)
      .value("gelu", OpKind::kGelu)
      .value("gelu_tanh", OpKind::kGeluTanh)
      .value("tanh", OpKind::kTanh)
      .value("sigmoid", OpKind::kSigmoid)
      .value("softplus", OpKind::kSoftplus)
      .value("max_pool", OpKind::kMaxPool)
      .value("avg_pool", OpKind::kAvgPool)
      .value("mean_pool", OpKind::kMeanPool)
      .value("flatten", OpKind::kFlatten)
      .value("add", OpKind::kAdd)
      .value("multiply", OpKind::kMultiply)
      .value("dropout", OpKind::kDropout);
  py::enum_<Precision>(m, "Precision", py::module_local())
      .value("float32", Precision::kFloat32)
      .value("tf32", Precision::kTf32)
      .value("bf16", Precision::kBf16);
  py::enum_<LossKind>(m, "LossKind", py::module_local())
      .value("cross_entropy", LossKind::kCrossEntropy)
      .value("mse", LossKind::kMse)
      .value("bce", LossKind::kBce);
  py::enum_<OptimizerKind>(m, "OptimizerKind", py::module_local())
      .value("sgd", OptimizerKind::kSgd)
      .value("adam", OptimizerKind::kAdam);
  py::enum_<LayoutKind>(m, "LayoutKind", py::module_local())
      .value("matrix", LayoutKind::kMatrix)
      .value("vector", LayoutKind::kVector)
      .value("picture", LayoutKind::kPicture);

  py::class_<Pair>(m, "Pair", py::module_local()).def(py::init([](int y, int x) { return Pair{y, x}; }));
  py::class_<Shape>(m, "Shape", py::module_local()).def(py::init([](int c, int h, int w) { return Shape{c, h, w}; }));
  py::class_<Op>(m, "Op", py::module_local())
      .def(py::init<>())
      .def_readwrite("kind", &Op::kind)
      .def_readwrite("output", &Op::output)
      .def_property("input", nullptr,
                    [](Op& op, std::pair<int, int> v) { op.input[0] = v.first, op.input[1] = v.second; })
      .def_property("param", nullptr,
                    [](Op& op, std::pair<int, int> v) { op.param[0] = v.first, op.param[1] = v.second; })
      .def_property("buffer", nullptr,
                    [](Op& op, std::pair<int, int> v) { op.buffer[0] = v.first, op.buffer[1] = v.second; })
      .def_property("scalar", nullptr,
                    [](Op& op, std::pair<double, double> v) { op.scalar[0] = v.first, op.scalar[1] = v.second; })
      .def_readwrite("kernel", &Op::kernel)
      .def_readwrite("stride", &Op::stride)
      .def_readwrite("padding", &Op::padding)
      .def_readwrite("dilation", &Op::dilation)
      .def_readwrite("groups", &Op::groups)
      .def_readwrite("site", &Op::site)
      .def_readwrite("count_padding", &Op::count_padding)
      .def_readwrite("eps", &Op::eps);
  py::class_<Parameter>(m, "Parameter", py::module_local())
      .def(py::init([](LayoutKind layout, int rows, int outputs, int inputs, Pair kernel) {
             return Parameter{layout, rows, outputs, inputs, kernel};
           }),
           py::arg("layout"), py::arg("rows"), py::arg("outputs"), py::arg("inputs") = 1, py::arg("kernel") = Pair{});
  py::class_<Graph>(m, "Graph", py::module_local())
      .def(py::init([](std::vector<Op> ops, std::vector<Shape> values, std::vector<Parameter> parameters, int output) {
        return Graph{std::move(ops), std::move(values), std::move(parameters), output};
      }));

  py::class_<Settings>(m, "Settings", py::module_local())
      .def(py::init<>())
      .def_readwrite("steps", &Settings::steps)
      .def_readwrite("first_step", &Settings::first_step)
      .def_readwrite("loss", &Settings::loss)
      .def_readwrite("optimizer", &Settings::optimizer)
      .def_readwrite("precision", &Settings::precision)
      .def_readwrite("first_order", &Settings::first_order)
      .def_readwrite("label_smoothing", &Settings::label_smoothing)
      .def_readwrite("momentum", &Settings::momentum)
      .def_readwrite("weight_decay", &Settings::weight_decay)
      .def_readwrite("beta1", &Settings::beta1)
      .def_readwrite("beta2", &Settings::beta2)
      .def_readwrite("eps", &Settings::eps)
      .def_readwrite("seed", &Settings::seed);
  py::class_<Inputs>(m, "Inputs", py::module_local())
      .def(py::init<>())
      .def_readwrite("parameters", &Inputs::parameters)
      .def_readwrite("buffers", &Inputs::buffers)
      .def_readwrite("rates", &Inputs::rates)
      .def_readwrite("per_step", &Inputs::per_step)
      .def_readwrite("wanted", &Inputs::wanted)
      .def_readwrite("support_x", &Inputs::support_x)
      .def_readwrite("support_y", &Inputs::support_y)
      .def_readwrite("support_weight", &Inputs::support_weight)
      .def_readwrite("rows", &Inputs::rows)
      .def_readwrite("initial", &Inputs::initial)
      .def_readwrite("query_x", &Inputs::query_x)
      .def_readwrite("query_y", &Inputs::query_y)
      .def_readwrite("step_weights", &Inputs::step_weights)
      .def_readwrite("task_weights", &Inputs::task_weights)
      .def_readwrite("flat_adjoint", &Inputs::flat_adjoint)
      .def_readwrite("prediction_adjoint", &Inputs::prediction_adjoint);

  py::class_<EncoderInputs>(m, "EncoderInputs", py::module_local())
      .def(py::init<>())
      .def_readwrite("x", &EncoderInputs::x)
      .def_readwrite("parameters", &EncoderInputs::parameters)
      .def_readwrite("buffers", &EncoderInputs::buffers)
      .def_readwrite("wanted", &EncoderInputs::wanted)
      .def_readwrite("wants_x", &EncoderInputs::wants_x)
      .def_readwrite("adjoint", &EncoderInputs::adjoint)
      .def_readwrite("number", &EncoderInputs::number);

  py::class_<FusedEngine>(m, "FusedEngine", py::module_local())
      .def(py::init<Graph, bool>(), py::arg("graph"), py::arg("on_gpu"))
      .def("footprint",
           [](FusedEngine& engine, const Settings& settings, int samples, bool in_double, int device) {
             const auto dtype = in_double ? at::kDouble : at::kFloat;
             const cuda::Footprint found = engine.footprint(settings, samples, dtype, device);
             return std::make_pair(found.task, found.block);
           })
      .def("run",
           [](FusedEngine& engine, const Settings& settings, const Inputs& inputs,
              const std::vector<std::string>& outputs) {
             return without_gil([&](const auto& poll) { return engine.run(settings, inputs, outputs, poll); });
           })
      .def("encode", [](FusedEngine& engine, const EncoderInputs& inputs, const std::vector<std::string>& outputs) {
        return without_gil([&](const auto& poll) { return engine.encode(inputs, outputs, poll); });
      });
  m.def(
      "sample_episodes",
      [](const at::Tensor& images, const at::Tensor& first, const at::Tensor& sizes, uint64_t key, int tasks, int ways,
         int shots, int queries, bool in_double) {
        return sample_episodes(images, first, sizes, key, tasks, ways, shots, queries,
                               in_double ? at::kDouble : at::kFloat);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("unflatten", [](const at::Tensor& flat, const std::vector<at::Tensor>& like) {
    return at::unflatten_dense_tensors(flat, like);
  });
  m.def("instruction_set", &cpu::instruction_set);
  m.attr("cuda") = kCuda;
  m.attr("why_no_cuda") = METAAUG_WHY_NO_CUDA;
}
