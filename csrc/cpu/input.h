// The input's way in and its adjoint's way out: torch's [N, C, H, W] outside, channels last inside, or patches. The
// output's way out and its adjoint's way in, and what batch norms have seen.
#pragma once

#include "network.h"

namespace metaaug::METAAUG_ISA {

// Row n of the engine's input is sample rows[n] of `x`, or sample n.
template <class T>
void load_input(const Network<T>& net, const T* x, const int64_t* rows, T* input) {
  const Shape& shape = net.graph->values[0];
  const Layout& layout = net.values[0];
  for (int n = 0; n < net.images; ++n, input += layout.sample()) {
    const T* from = x + (rows ? rows[n] : n) * shape.size();
    if (net.patches) {
      load_patches(*net.patches, shape, layout, from, input);
      continue;
    }
    T* to = input;
    for (int i = 0; i < shape.pixels(); ++i, to += layout.stride) {
      for (int c = 0; c < shape.channels; ++c) to[c] = from[int64_t{c} * shape.pixels() + i];
      std::fill(to + shape.channels, to + layout.stride, T(0));
    }
  }
}

// Of a picture, what each output pixel of the convolution reads: [taps, channels], zero beyond the border.
template <class T>
void load_patches(const Op& conv, const Shape& picture, const Layout& layout, const T* from, T* to) {
  const int taps = conv.kernel.y * conv.kernel.x;
  for (int y = 0; y < layout.shape.height; ++y)
    for (int tap = 0; tap < taps; ++tap) {
      const int in_y = y * conv.stride.y - conv.padding.y + tap / conv.kernel.x * conv.dilation.y;
      const int in_x = tap % conv.kernel.x * conv.dilation.x - conv.padding.x;
      for (int c = 0; c < picture.channels; ++c) {
        const T* line = from + (int64_t{c} * picture.height + in_y) * picture.width;
        T* target = to + int64_t{y} * layout.shape.width * layout.stride + tap * picture.channels + c;
        for (int x = 0, at = in_x; x < layout.shape.width; ++x, at += conv.stride.x, target += layout.stride) {
          const bool inside = in_y >= 0 && in_y < picture.height && at >= 0 && at < picture.width;
          *target = inside ? line[at] : T(0);
        }
      }
    }
}

// The reverse of load_input without patches: adds an adjoint of the engine's input to one in torch's layout.
template <class T>
void add_input_adjoint(const Network<T>& net, const T* from, const int64_t* rows, T* target) {
  const Shape& shape = net.graph->values[0];
  for (int n = 0; n < net.images; ++n) {
    T* to = target + (rows ? rows[n] : n) * shape.size();
    for (int i = 0; i < shape.pixels(); ++i, from += net.values[0].stride)
      for (int c = 0; c < shape.channels; ++c) to[int64_t{c} * shape.pixels() + i] += from[c];
  }
}

// All samples' outputs, without padding.
template <class T>
void unload_output(const Network<T>& net, const T* z, T* to) {
  const int64_t outputs = net.graph->values[net.graph->output].size();
  for (int n = 0; n < net.images; ++n, z += net.loss.stride) to = std::copy(z, z + outputs, to);
}

template <class T>
void load_output_adjoint(const Network<T>& net, const T* from, T* dz) {
  const int64_t outputs = net.graph->values[net.graph->output].size();
  for (int n = 0; n < net.images; ++n, from += outputs, dz += net.loss.stride)
    std::fill(std::copy(from, from + outputs, dz), dz + net.loss.stride, T(0));
}

// Mean and unbiased variance of every batch norm over so many samples, in order of ops, from what saved(op) points to.
template <class T, class Saved>
void unload_statistics(const Network<T>& net, int64_t samples, const Saved& saved, T* to) {
  for (size_t i = 0; i < net.ops.size(); ++i) {
    const OpPlan<T>& op = net.ops[i];
    if (op.op.kind != OpKind::kBatchNorm) continue;
    const int64_t rows = samples * op.in[0].shape.pixels(), channels = op.out.shape.channels;
    const T *mean = saved(i), *variance = mean + 2 * op.out.stride;
    const T unbiased = T(rows) / T(std::max<int64_t>(rows - 1, 1));
    to = std::copy(mean, mean + channels, to);
    for (int64_t c = 0; c < channels; ++c) *to++ = variance[c] * unbiased;
  }
}

}  // namespace metaaug::METAAUG_ISA
