// conv2d of pictures that lie in global memory, as products of matrices: pixels of all images by channels, over what
// each pixel reads; for the weight gradient output channels by weights, over pixels of all images.
#pragma once

#include "op.h"
#include "tile.h"

namespace metaaug::cuda {

template <class T>
struct Conv2dTiles {
  const OpCall<T>& call;
  const Node& node;
  const Op& op;
  const Shape &in, &out;
  const int taps, in_pixels, out_pixels, inputs, outputs;
  const Divide by_taps, by_kernel, by_in_pixels, by_out_pixels, by_in_width, by_out_width;

  METAAUG_DEVICE explicit Conv2dTiles(const OpCall<T>& call)
      : call(call),
        node(*call.node),
        op(node.op),
        in(node.in[0]),
        out(node.out),
        taps(op.kernel.y * op.kernel.x),
        in_pixels(in.pixels()),
        out_pixels(out.pixels()),
        inputs(in.channels),
        outputs(out.channels),
        by_taps(taps, int64_t{taps} * (inputs > outputs ? inputs : outputs)),
        by_kernel(op.kernel.x, taps),
        by_in_pixels(in_pixels, int64_t{call.images} * in_pixels),
        by_out_pixels(out_pixels, int64_t{call.images} * out_pixels),
        by_in_width(in.width, in_pixels),
        by_out_width(out.width, out_pixels) {}

  struct Product {
    const T *a, *b;
  };

  // An image's start and where in it a window begins.
  struct Window {
    int64_t first;
    int y, x;
  };

  // y = bias + sum of inputs and weights.
  METAAUG_DEVICE void convolve(const Product* products, int terms, const T* bias, T* y) const {
    const int64_t depth = int64_t{inputs} * taps;
    multiply_tiles(
        call.tile, call.images * out_pixels, outputs, int(depth), terms, out_pixels == 1,
        [&](int m) { return window_of_output(m); },
        [&](int term, const Window& window, int k) {
          const int c = by_taps(k);
          return read(products[term].a, window, c, k - c * taps);
        },
        [&](int term, int k, int o) { return products[term].b[o * depth + k]; },
        [&](int m, int o, T value) {
          const int n = by_out_pixels(m);
          y[(int64_t{n} * outputs + o) * out_pixels + m - n * out_pixels] = value + value_or(bias, o, T(0));
        });
  }

  // dx (+)= sum of output adjoints and weights.
  METAAUG_DEVICE void convolve_back(const Product* products, int terms, T* dx) const {
    const bool accumulate = call.accumulate[0];
    multiply_tiles(
        call.tile, call.images * in_pixels, inputs, outputs * taps, terms, in_pixels == 1,
        [&](int m) {
          const int n = by_in_pixels(m), pixel = m - n * in_pixels, y = by_in_width(pixel);
          return Window{n * out.size(), y + op.padding.y, pixel - y * in.width + op.padding.x};
        },
        [&](int term, const Window& window, int k) {
          const int o = by_taps(k), tap = k - o * taps, ky = by_kernel(tap), kx = tap - ky * op.kernel.x;
          int y = window.y - ky * op.dilation.y, x = window.x - kx * op.dilation.x;
          if (y < 0 || x < 0) return T(0);
          if (op.stride.y > 1 || op.stride.x > 1) {
            if (y % op.stride.y || x % op.stride.x) return T(0);
            y /= op.stride.y;
            x /= op.stride.x;
          }
          if (y >= out.height || x >= out.width) return T(0);
          return products[term].a[window.first + int64_t{o} * out_pixels + y * out.width + x];
        },
        [&](int term, int k, int c) {
          const int o = by_taps(k);
          return products[term].b[(int64_t{o} * inputs + c) * taps + k - o * taps];
        },
        [&](int m, int c, T value) {
          const int n = by_in_pixels(m);
          put(dx + (int64_t{n} * inputs + c) * in_pixels + m - n * in_pixels, value, accumulate);
        });
  }

  // dw += sum of inputs and output adjoints.
  METAAUG_DEVICE void weight_gradient(const Product* products, int terms, T* dw) const {
    const int columns = inputs * taps;
    multiply_tiles(
        call.tile, outputs, columns, call.images * out_pixels, terms, true, [](int o) { return o; },
        [&](int term, int o, int k) {
          const int n = by_out_pixels(k);
          return products[term].b[(int64_t{n} * outputs + o) * out_pixels + k - n * out_pixels];
        },
        [&](int term, int k, int column) {
          const int c = by_taps(column);
          return read(products[term].a, window_of_output(k), c, column - c * taps);
        },
        [&](int o, int column, T value) { dw[int64_t{o} * columns + column] += value; });
  }

 private:
  METAAUG_DEVICE Window window_of_output(int m) const {
    const int n = by_out_pixels(m), pixel = m - n * out_pixels, y = by_out_width(pixel);
    return {n * in.size(), y * op.stride.y - op.padding.y, (pixel - y * out.width) * op.stride.x - op.padding.x};
  }

  // What a tap of a window reads of a channel.
  METAAUG_DEVICE T read(const T* x, const Window& window, int c, int tap) const {
    const int ky = by_kernel(tap), kx = tap - ky * op.kernel.x;
    const int row = window.y + ky * op.dilation.y, column = window.x + kx * op.dilation.x;
    if (row < 0 || row >= in.height || column < 0 || column >= in.width) return T(0);
    return x[window.first + int64_t{c} * in_pixels + row * in.width + column];
  }
};

}  // namespace metaaug::cuda
