// The op list that every executor runs, as plain structs: no torch, no CUDA headers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "host_device.h"

namespace metaaug {

enum class OpKind {
  kConv2d,  // a linear layer is a 1x1 convolution of a 1x1 picture
  kBatchNorm,
  kLayerNorm,
  kGroupNorm,
  kRelu,
  kLeakyRelu,
  kGelu,
  kGeluTanh,
  kTanh,
  kSigmoid,
  kSoftplus,
  kMaxPool,
  kAvgPool,
  kMeanPool,
  kFlatten,
  kAdd,       // of equal shapes, or the second input has one pixel for all of a sample's
  kMultiply,  // the same
  kDropout,
};

enum class LossKind { kCrossEntropy, kMse, kBce };
enum class OptimizerKind { kSgd, kAdam };
enum class Precision { kFloat32, kTf32, kBf16 };  // of products in single precision, on a GPU

// A value per sample; a flat feature vector is a 1x1 picture.
struct Shape {
  int channels = 0, height = 1, width = 1;
  METAAUG_HD int pixels() const { return height * width; }
  METAAUG_HD int64_t size() const { return int64_t{channels} * pixels(); }
};

struct Pair {
  int y = 1, x = 1;
};

// values[output] = kind(values[input], parameters; attributes). Indices are -1 where absent.
struct Op {
  OpKind kind = OpKind::kAdd;
  int input[2] = {-1, -1};
  int output = -1;
  int param[2] = {-1, -1};   // weight, bias
  int buffer[2] = {-1, -1};  // frozen mean, variance
  Pair kernel, stride, padding{0, 0}, dilation;
  int groups = 1;
  int site = 0;  // ordinal of a dropout call
  bool count_padding = true;
  // What fuse() has found: the relu and the 2x2 max pool behind this are done by it; a batch norm behind it takes the
  // bias away again.
  bool relu = false, pool = false, idle_bias = false;
  double eps = 0;
  double scalar[2] = {0, 0};  // leaky slope | softplus beta, threshold | dropout p
};

// How a parameter of the user's layout lies in the engine's: a matrix [O, I, kh, kw] becomes panels of output
// channels, a vector [C] gets its channel padding, a picture [C, H, W] becomes [H, W, C].
enum class LayoutKind { kMatrix, kVector, kPicture };

struct Parameter {
  LayoutKind layout = LayoutKind::kVector;
  int rows = 1;  // > 1: one row for each inner step
  int outputs = 0, inputs = 1;
  Pair kernel;  // kMatrix: taps; kPicture: height, width
  int64_t size() const { return int64_t{rows} * outputs * inputs * kernel.y * kernel.x; }
};

// Value 0 is the input; parameters are in the model's order.
struct Graph {
  std::vector<Op> ops;
  std::vector<Shape> values;
  std::vector<Parameter> parameters;
  int output = 0;

  // How many inputs of ops each value is.
  std::vector<int> readers() const {
    std::vector<int> result(values.size(), 0);
    for (const Op& op : ops)
      for (int input : op.input)
        if (input >= 0) ++result[input];
    return result;
  }
};

}  // namespace metaaug
