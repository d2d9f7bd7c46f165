// A graph planned for a number of samples, as kernels read it: arrays of plain structs. Values lie in torch's order,
// [N, C, H, W], and parameters as the user has them, so nothing is packed.
#pragma once

#include "../flow.h"
#include "divide.h"

namespace metaaug::cuda {

// Where a value lies in a frame, in elements; -1: nowhere.
struct Place {
  int64_t value = -1, adjoint = -1;
  bool still = false, border = false;  // see Flow
};

// What one weight of a convolution reads: from a window's first pixel so many elements on, so many rows and columns in.
// On the way back it is an output channel's tap, so many rows and columns before; where the stride is not 1, the offset
// is the channel's alone. By default beyond every picture.
class alignas(8) Tap {
 public:
  Tap() : Tap(0, 1 << 14, 1 << 14) {}
  Tap(int offset, int y, int x) : offset(offset), place_(int(uint32_t(y) << 16 | (uint32_t(x) & 0xffff))) {}
  METAAUG_HD int y() const { return place_ >> 16; }
  METAAUG_HD int x() const { return short(place_); }

  int offset;

 private:
  int place_;  // y and x: a GPU reads whole words
};

// So many of the latter are behind the taps of an op, for the last tile.
inline constexpr int kTapsBehind = 256;

// One op, with all that a kernel has to know of it.
struct Node {
  Op op;
  Shape in[2], out;
  Divide by_in_pixels, by_in_width, by_out_pixels, by_out_width, by_stride_y, by_stride_x, by_kernel;
  const Tap *taps = nullptr, *taps_back = nullptr;  // [inputs, kernel], [outputs, kernel]
  Wants inner, outer;
  bool still = false;                     // see Flow
  bool moves[2] = {false, false};         // its inputs
  bool masked[2] = {false, false};        // whether an input is a product's relu, whose zeros let no adjoint through
  bool adapted[2] = {false, false};       // its parameters
  bool updates[2] = {false, false};       // whether an inner step of a parameter is done with its gradient
  int64_t param[2] = {0, 0};              // offsets in theta
  int rows[2] = {1, 1}, row[2] = {0, 0};  // of a parameter with a row for each step: how many, and their size
  int64_t saved = 0, saved_tangent = 0;
};

struct Program {
  const Node* nodes = nullptr;
  const Place* places = nullptr;
  int count = 0, images = 0, output = 0;
  bool output_moves = false;
  Shape sample, result;
  int64_t input = 0, values = 0, adjoints = 0, saved = 0, tangents_saved = 0, still = 0, carried = 0;  // elements

  // What the loss keeps beside that.
  METAAUG_HD int64_t probabilities(LossKind loss) const {
    return loss == LossKind::kCrossEntropy ? (images * result.size() + 3) / 4 * 4 : 0;
  }
};

}  // namespace metaaug::cuda
