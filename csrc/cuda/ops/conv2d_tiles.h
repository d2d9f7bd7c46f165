// conv2d of pictures that lie in global memory, as products of matrices: pixels of all images by channels, over what
// each pixel reads; for the weight gradient output channels by weights, over pixels of all images.
//
// What finds an element holds copies of all that it needs, and has no branches: it runs for every element that is read.
#pragma once

#include "tile.h"

namespace metaaug::cuda {

// Where a window begins: its first pixel, maybe beyond the picture, in the array, in rows and in columns; by default
// beyond every picture.
struct Window {
  int first = 0, y = 1 << 14, x = 1 << 14;
};

// Of pixel m among those of all images.
struct Windows {
  int limit;
  Divide by_pixels, by_width;
  Pair stride;
  int top, left;           // of the first one
  int image, picture_row;  // elements of what is read

  METAAUG_DEVICE Window operator()(int m) const {
    const int n = by_pixels(m), pixel = by_pixels.rest(m, n), row = by_width(pixel);
    const int y = row * stride.y + top, x = by_width.rest(pixel, row) * stride.x + left;
    return m < limit ? Window{n * image + y * picture_row + x, y, x} : Window();
  }
};

struct Taps {
  const Tap* taps;
  METAAUG_DEVICE Tap operator()(int k) const { return taps[k]; }
};

// What a window has at a tap.
struct AtTap {
  int height, width;
  template <class T>
  METAAUG_DEVICE T operator()(const T* x, const Window& w, const Tap& t) const {
    const bool inside = (unsigned(w.y + t.y()) < unsigned(height)) & (unsigned(w.x + t.x()) < unsigned(width));
    return inside ? x[w.first + t.offset] : T(0);
  }
  template <class T>
  METAAUG_DEVICE T operator()(const T* x, const Tap& t, const Window& w) const {
    return (*this)(x, w, t);
  }
};

// The same on the way back through a stride, where only some rows and columns have been read.
struct AtTapOfStride {
  int height, width;
  Divide by_y, by_x;
  template <class T>
  METAAUG_DEVICE T operator()(const T* dy, const Window& w, const Tap& t) const {
    const int from_y = w.y + t.y(), from_x = w.x + t.x();
    const int y = by_y(from_y < 0 ? 0 : from_y), x = by_x(from_x < 0 ? 0 : from_x);
    const bool inside = (from_y >= 0) & (from_x >= 0) & (y < height) & (x < width) & (by_y.rest(from_y, y) == 0) &
                        (by_x.rest(from_x, x) == 0);
    return inside ? dy[w.first - w.y * width - w.x + t.offset + y * width + x] : T(0);
  }
};

// A place for each index, so far apart; -1: none.
struct Apart {
  int limit, size;
  METAAUG_DEVICE int operator()(int i) const { return i < limit ? i * size : -1; }
};

// The place in the first of so many channels of pixel k among those of all images.
struct OfPixels {
  int limit, channels, pixels;
  Divide by_pixels;
  METAAUG_DEVICE int operator()(int k) const {
    const int n = by_pixels(k);
    return k < limit ? n * channels * pixels + by_pixels.rest(k, n) : -1;
  }
};

// The place of an output channel's tap among the weights of the first input channel.
struct OfTaps {
  int limit, inputs, kernel;
  Divide by_kernel;
  METAAUG_DEVICE int operator()(int k) const {
    const int o = by_kernel(k);
    return k < limit ? o * inputs * kernel + by_kernel.rest(k, o) : -1;
  }
};

// What lies at the sum of two places.
struct AtPlaces {
  template <class T>
  METAAUG_DEVICE T operator()(const T* array, int one, int other) const {
    return (one | other) < 0 ? T(0) : array[one + other];
  }
};

template <class T>
class Conv2dTiles {
 public:
  METAAUG_DEVICE explicit Conv2dTiles(const OpCall<T>& call)
      : call(call),
        node(*call.node),
        in(node.in[0]),
        out(node.out),
        kernel(node.op.kernel.y * node.op.kernel.x),
        in_pixels(in.pixels()),
        out_pixels(out.pixels()),
        inputs(in.channels),
        outputs(out.channels) {}

  // y or, `tangent`, y_t: bias and the sum of inputs and weights.
  METAAUG_DEVICE METAAUG_NOINLINE void convolve(const Product<T>* products, int terms, const T* bias,
                                                bool tangent) const {
    const int rows = call.images * out_pixels, depth = inputs * kernel;
    const auto patches = side<false>(windows(), Taps{in_global(node.taps)}, AtTap{in.height, in.width});
    const auto weights = side<true>(Apart{outputs, depth}, Apart{depth, 1}, AtPlaces());
    const OfPixels places{rows, outputs, out_pixels, node.by_out_pixels};
    multiply_tiles(call.tiles, 0, rows, outputs, depth, products, terms, patches, weights,
                   [&, places](int m, int o, T value) {
                     call.put_value(tangent, places(m) + o * out_pixels, value + value_or(bias, o, T(0)));
                   });
  }

  // dx (+)= sum of output adjoints and weights.
  METAAUG_DEVICE METAAUG_NOINLINE void convolve_back(const Product<T>* products, int terms, T* const* dx) const {
    const Op& op = node.op;
    const int rows = call.images * in_pixels, depth = outputs * kernel;
    const Windows pixels{rows,         node.by_in_pixels, node.by_in_width,     Pair(),
                         op.padding.y, op.padding.x,      outputs * out_pixels, out.width};
    const Taps taps{in_global(node.taps_back)};
    const auto weights = side<true>(Apart{inputs, kernel}, OfTaps{depth, inputs, kernel, node.by_kernel}, AtPlaces());
    const OfPixels places{rows, inputs, in_pixels, node.by_in_pixels};
    const auto multiply = [&](const auto& at) {
      multiply_tiles(call.tiles, 0, rows, inputs, depth, products, terms, side<false>(pixels, taps, at), weights,
                     [&, places](int m, int c, T value) { call.put_adjoint(dx, 0, places(m) + c * in_pixels, value); });
    };
    if (op.stride.y == 1 && op.stride.x == 1)
      multiply(AtTap{out.height, out.width});
    else
      multiply(AtTapOfStride{out.height, out.width, node.by_stride_y, node.by_stride_x});
  }

  // dw += sum of output adjoints and inputs.
  METAAUG_DEVICE METAAUG_NOINLINE void weight_gradient(const Product<T>* products, int terms, T* const* dw) const {
    const int columns = inputs * kernel, depth = call.images * out_pixels;
    const auto adjoints =
        side<true>(Apart{outputs, out_pixels}, OfPixels{depth, outputs, out_pixels, node.by_out_pixels}, AtPlaces());
    const auto patches = side<true>(Taps{in_global(node.taps)}, windows(), AtTap{in.height, in.width});
    multiply_tiles(call.tiles, 1, outputs, columns, depth, products, terms, adjoints, patches,
                   [&](int o, int column, T value) { call.add_gradient(dw, 0, o * columns + column, value); });
  }

 private:
  METAAUG_DEVICE Windows windows() const {
    const Op& op = node.op;
    return {call.images * out_pixels,
            node.by_out_pixels,
            node.by_out_width,
            op.stride,
            -op.padding.y,
            -op.padding.x,
            inputs * in_pixels,
            in.width};
  }

  const OpCall<T>& call;
  const Node& node;
  const Shape &in, &out;
  const int kernel, in_pixels, out_pixels, inputs, outputs;
};

}  // namespace metaaug::cuda
