// conv2d of pictures that lie in global memory, as products of matrices: pixels of all images by channels, over what
// each pixel reads; for the weight gradient output channels by weights, over pixels of all images.
#pragma once

#include "tile.h"

namespace metaaug::cuda {

template <class T>
struct Conv2dTiles {
  const OpCall<T>& call;
  const Node& node;
  const Shape &in, &out;
  const int kernel, in_pixels, out_pixels, inputs, outputs;

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

  struct Product {
    const T *a, *b;
  };

  // Where a window begins: its first pixel, maybe beyond the picture, in the array, in rows and in columns.
  struct Window {
    int first, y, x;
  };

  // store(pixel's place in the first channel of its output, channel, sum of inputs and weights)
  template <class Store>
  METAAUG_DEVICE void convolve(const Product* products, int terms, const Store& store) const {
    const int depth = inputs * kernel;
    const auto windows =
        side<false>([&](int m) { return window(m); }, [&](int k) { return node.taps[k]; },
                    [&](int term, const Window& w, const Tap& t) { return read(products[term].a, w, t); });
    const auto weights = side<true>([&](int o) { return o * depth; }, [](int k) { return k; },
                                    [&](int term, int first, int k) { return products[term].b[first + k]; });
    multiply_tiles(call.tiles, 0, call.images * out_pixels, outputs, depth, terms, windows, weights,
                   [&](int m, int o, T value) { store(place(m, node.by_out_pixels, out_pixels, outputs), o, value); });
  }

  METAAUG_DEVICE void convolve_back(const Product* products, int terms, T* const* dx) const {
    const auto windows =
        side<false>([&](int m) { return window_back(m); }, [&](int k) { return node.taps_back[k]; },
                    [&](int term, const Window& w, const Tap& t) { return read_back(products[term].a, w, t); });
    const auto weights = side<true>([&](int c) { return c * kernel; }, [&](int k) { return node.taps_back[k].weight; },
                                    [&](int term, int first, int k) { return products[term].b[first + k]; });
    multiply_tiles(call.tiles, 0, call.images * in_pixels, inputs, outputs * kernel, terms, windows, weights,
                   [&](int m, int c, T value) {
                     call.put_adjoint(dx, 0, place(m, node.by_in_pixels, in_pixels, inputs) + c * in_pixels, value);
                   });
  }

  // dw += sum of inputs and output adjoints.
  METAAUG_DEVICE void weight_gradient(const Product* products, int terms, T* const* dw) const {
    const int columns = inputs * kernel;
    const auto adjoints = side<true>([&](int o) { return o * out_pixels; },
                                     [&](int k) { return place(k, node.by_out_pixels, out_pixels, outputs); },
                                     [&](int term, int first, int k) { return products[term].b[first + k]; });
    const auto windows =
        side<true>([&](int column) { return node.taps[column]; }, [&](int k) { return window(k); },
                   [&](int term, const Tap& t, const Window& w) { return read(products[term].a, w, t); });
    multiply_tiles(call.tiles, 1, outputs, columns, call.images * out_pixels, terms, adjoints, windows,
                   [&](int o, int column, T value) { call.add_gradient(dw, 0, o * columns + column, value); });
  }

 private:
  // Of a pixel among those of all images, the place in the first channel.
  METAAUG_DEVICE static int place(int pixel, const Divide& by_pixels, int pixels, int channels) {
    const int n = by_pixels(pixel);
    return n * channels * pixels + by_pixels.rest(pixel, n);
  }

  METAAUG_DEVICE Window window(int m) const {
    const Op& op = node.op;
    const int n = node.by_out_pixels(m), pixel = node.by_out_pixels.rest(m, n), row = node.by_out_width(pixel);
    const int y = row * op.stride.y - op.padding.y;
    const int x = node.by_out_width.rest(pixel, row) * op.stride.x - op.padding.x;
    return {n * inputs * in_pixels + y * in.width + x, y, x};
  }

  METAAUG_DEVICE T read(const T* x, const Window& w, const Tap& t) const {
    const bool inside = unsigned(w.y + t.y) < unsigned(in.height) && unsigned(w.x + t.x) < unsigned(in.width);
    return inside ? x[w.first + t.offset] : T(0);
  }

  // The same of an input's pixel: what tap (0, 0) makes of it.
  METAAUG_DEVICE Window window_back(int m) const {
    const int n = node.by_in_pixels(m), pixel = node.by_in_pixels.rest(m, n), row = node.by_in_width(pixel);
    return {n * outputs * out_pixels, row + node.op.padding.y, node.by_in_width.rest(pixel, row) + node.op.padding.x};
  }

  METAAUG_DEVICE T read_back(const T* dy, const Window& w, const Tap& t) const {
    const int from_y = w.y - t.y, from_x = w.x - t.x;
    if (from_y < 0 || from_x < 0) return T(0);
    const int y = node.by_stride_y(from_y), x = node.by_stride_x(from_x);
    if (y >= out.height || x >= out.width) return T(0);
    if (node.by_stride_y.rest(from_y, y) || node.by_stride_x.rest(from_x, x)) return T(0);
    return dy[w.first + t.offset + y * out.width + x];
  }
};

}  // namespace metaaug::cuda
