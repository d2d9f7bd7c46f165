// conv2d, and linear as its 1x1 case on a 1x1 picture. A tangent is two products, added up in one pass. What lies in
// shared memory is read from there; what does not, goes through tiles.
#pragma once

#include "conv2d_tiles.h"
#include "linear.h"

namespace metaaug::cuda {

template <class T>
struct Conv2d {
  METAAUG_DEVICE static void forward(const OpCall<T>& call) {
    const Product<T> product[] = {{call.x[0], call.p[0]}};
    convolve(call, product, 1, call.p[1], false);
  }

  METAAUG_DEVICE static void backward(const OpCall<T>& call) {
    if (call.dx[0]) {
      const Product<T> product[] = {{call.dy, call.p[0]}};
      convolve_back(call, product, 1, call.dx);
    }
    if (call.dp[0]) {
      const Product<T> product[] = {{call.dy, call.x[0]}};
      weight_gradient(call, product, 1, call.dp);
    }
    if (call.dp[1]) bias_gradient(call, call.dy, call.dp);
  }

  METAAUG_DEVICE static void tangent(const OpCall<T>& call) {
    Product<T> products[2] = {};
    int terms = 0;
    if (call.x_t[0]) products[terms++] = {call.x_t[0], call.p[0]};
    if (call.p_t[0]) products[terms++] = {call.x[0], call.p_t[0]};
    convolve(call, products, terms, call.p_t[1], true);
  }

  METAAUG_DEVICE static void tangent_backward(const OpCall<T>& call) {
    if (call.dx_t[0]) {
      const Product<T> products[] = {{call.dy_t, call.p[0]}, {call.dy, call.p_t[0]}};
      convolve_back(call, products, call.p_t[0] ? 2 : 1, call.dx_t);
    }
    if (call.dp_t[0]) {
      const Product<T> products[] = {{call.dy_t, call.x[0]}, {call.dy, call.x_t[0]}};
      weight_gradient(call, products, call.x_t[0] ? 2 : 1, call.dp_t);
    }
    if (call.dp_t[1]) bias_gradient(call, call.dy_t, call.dp_t);
  }

 private:
  METAAUG_DEVICE static bool linear(const Node& node) {
    const Op& op = node.op;
    return node.in[0].pixels() == 1 && op.kernel.y * op.kernel.x == 1 && op.padding.y == 0 && op.padding.x == 0;
  }

  // y or, `tangent`, y_t: bias and the sum of inputs and weights. Where the bias alone moves there are no terms, and no
  // tiles, which are of products.
  METAAUG_DEVICE static void convolve(const OpCall<T>& call, const Product<T>* products, int terms, const T* bias,
                                      bool tangent) {
    const Node& node = *call.node;
    const Op& op = node.op;
    const Shape &in = node.in[0], &out = node.out;
    const int kernel = op.kernel.y * op.kernel.x;
    if (call.tiles.used && terms > 0) return Conv2dTiles<T>(call).convolve(products, terms, bias, tangent);
    if (linear(node))
      return Linear<T>::convolve(call.images, in.channels, out.channels, products, terms, bias,
                                 [&](int n, int o, T value) { call.put_value(tangent, n * out.channels + o, value); });
    each(call.images * out.size(), [&](int i) {
      const int plane = node.by_out_pixels(i), pixel = node.by_out_pixels.rest(i, plane);
      const int n = plane / out.channels, o = plane - n * out.channels, row = node.by_out_width(pixel);
      const int top = row * op.stride.y - op.padding.y;
      const int left = node.by_out_width.rest(pixel, row) * op.stride.x - op.padding.x;
      T sum = value_or(bias, o, T(0));
      for (int term = 0; term < terms; ++term) {
        const T *x = products[term].a + n * in.size(), *w = products[term].b + o * in.channels * kernel;
        for (int c = 0; c < in.channels; ++c, x += in.pixels(), w += kernel) {
          for (int ky = 0; ky < op.kernel.y; ++ky) {
            const int iy = top + ky * op.dilation.y;
            if (iy < 0 || iy >= in.height) continue;
            for (int kx = 0; kx < op.kernel.x; ++kx) {
              const int ix = left + kx * op.dilation.x;
              if (ix >= 0 && ix < in.width) sum += x[iy * in.width + ix] * w[ky * op.kernel.x + kx];
            }
          }
        }
      }
      call.put_value(tangent, i, sum);
    });
  }

  // dx (+)= sum of output adjoints and weights.
  METAAUG_DEVICE static void convolve_back(const OpCall<T>& call, const Product<T>* products, int terms, T* const* dx) {
    const Node& node = *call.node;
    const Op& op = node.op;
    const Shape &in = node.in[0], &out = node.out;
    if (call.tiles.used) return Conv2dTiles<T>(call).convolve_back(products, terms, dx);
    if (linear(node))
      return Linear<T>::convolve_back(
          call.images, in.channels, out.channels, products, terms,
          [&](int n, int c, T value) { call.put_adjoint(dx, 0, n * in.channels + c, value); });
    const int kernel = op.kernel.y * op.kernel.x;
    each(call.images * in.size(), [&](int i) {
      const int plane = node.by_in_pixels(i), pixel = node.by_in_pixels.rest(i, plane);
      const int n = plane / in.channels, c = plane - n * in.channels, row = node.by_in_width(pixel);
      const int bottom = row + op.padding.y, right = node.by_in_width.rest(pixel, row) + op.padding.x;
      T sum = 0;
      for (int ky = 0; ky < op.kernel.y; ++ky) {
        const int from_y = bottom - ky * op.dilation.y, oy = node.by_stride_y(from_y < 0 ? 0 : from_y);
        if (from_y < 0 || node.by_stride_y.rest(from_y, oy) || oy >= out.height) continue;
        for (int kx = 0; kx < op.kernel.x; ++kx) {
          const int from_x = right - kx * op.dilation.x, ox = node.by_stride_x(from_x < 0 ? 0 : from_x);
          if (from_x < 0 || node.by_stride_x.rest(from_x, ox) || ox >= out.width) continue;
          const int at = n * int(out.size()) + oy * out.width + ox, tap = c * kernel + ky * op.kernel.x + kx;
          for (int term = 0; term < terms; ++term) {
            const T *dy = products[term].a + at, *w = products[term].b + tap;
            for (int o = 0; o < out.channels; ++o) sum += dy[o * out.pixels()] * w[o * in.channels * kernel];
          }
        }
      }
      call.put_adjoint(dx, 0, i, sum);
    });
  }

  // dw += sum of output adjoints and inputs.
  METAAUG_DEVICE static void weight_gradient(const OpCall<T>& call, const Product<T>* products, int terms,
                                             T* const* dw) {
    const Node& node = *call.node;
    const Op& op = node.op;
    const Shape &in = node.in[0], &out = node.out;
    if (call.tiles.used) return Conv2dTiles<T>(call).weight_gradient(products, terms, dw);
    if (linear(node))
      return Linear<T>::weight_gradient(
          call.images, in.channels, out.channels, products, terms,
          [&](int o, int c, T value) { call.add_gradient(dw, 0, o * in.channels + c, value); });
    const int kernel = op.kernel.y * op.kernel.x;
    each(out.channels * in.channels * kernel, [&](int i) {
      const int tap = i % kernel, c = i / kernel % in.channels, o = i / kernel / in.channels;
      const int shift_y = tap / op.kernel.x * op.dilation.y - op.padding.y;
      const int shift_x = tap % op.kernel.x * op.dilation.x - op.padding.x;
      T sum = 0;
      for (int term = 0; term < terms; ++term)
        for (int n = 0; n < call.images; ++n) {
          const T* x = products[term].b + n * in.size() + c * in.pixels();
          const T* dy = products[term].a + n * out.size() + o * out.pixels();
          for (int y = 0; y < out.height; ++y) {
            const int iy = y * op.stride.y + shift_y;
            if (iy < 0 || iy >= in.height) continue;
            for (int at = 0; at < out.width; ++at) {
              const int ix = at * op.stride.x + shift_x;
              if (ix >= 0 && ix < in.width) sum += x[iy * in.width + ix] * dy[y * out.width + at];
            }
          }
        }
      call.add_gradient(dw, 0, i, sum);
    });
  }

  // A thread takes a channel, or a warp one with more pixels than it has lanes.
  METAAUG_DEVICE static void bias_gradient(const OpCall<T>& call, const T* dy, T* const* db) {
    const Shape& out = call.node->out;
    const int pixels = out.pixels(), count = call.images * pixels, size = int(out.size());
    const auto sum = [&](int o, int first, int step) {
      T total = 0;
      for (int i = first; i < count; i += step) {
        const int n = call.node->by_out_pixels(i);
        total += dy[n * size + o * pixels + call.node->by_out_pixels.rest(i, n)];
      }
      return total;
    };
    if (count <= kWarp) return each(out.channels, [&](int o) { call.add_gradient(db, 1, o, sum(o, 0, 1)); });
    each_of_warp(out.channels, [&](int o) {
      const T total = warp_sum(sum(o, lane(), kWarp));
      if (lane() == 0) call.add_gradient(db, 1, o, total);
    });
  }
};

}  // namespace metaaug::cuda
