// conv2d, and linear as its 1x1 case on a 1x1 picture. A tangent is two products, added up in one pass. What lies in
// shared memory is read from there; what does not, goes through tiles.
#pragma once

#include "conv2d_tiles.h"

namespace metaaug::cuda {

template <class T>
struct Conv2d {
  using Product = typename Conv2dTiles<T>::Product;

  METAAUG_DEVICE static void forward(const OpCall<T>& call) {
    const Product product[] = {{call.x[0], call.p[0]}};
    convolve(call, product, 1, call.p[1], call.y);
  }

  METAAUG_DEVICE static void backward(const OpCall<T>& call) {
    if (call.dx[0]) {
      const Product product[] = {{call.dy, call.p[0]}};
      convolve_back(call, product, 1, call.dx[0]);
    }
    if (call.dp[0]) {
      const Product product[] = {{call.x[0], call.dy}};
      weight_gradient(call, product, 1, call.dp[0]);
    }
    if (call.dp[1]) bias_gradient(call, call.dy, call.dp[1]);
  }

  METAAUG_DEVICE static void tangent(const OpCall<T>& call) {
    Product products[2] = {};
    int terms = 0;
    if (call.x_t[0]) products[terms++] = {call.x_t[0], call.p[0]};
    if (call.p_t[0]) products[terms++] = {call.x[0], call.p_t[0]};
    convolve(call, products, terms, call.p_t[1], call.y_t);
  }

  METAAUG_DEVICE static void tangent_backward(const OpCall<T>& call) {
    if (call.dx_t[0]) {
      const Product products[] = {{call.dy_t, call.p[0]}, {call.dy, call.p_t[0]}};
      convolve_back(call, products, call.p_t[0] ? 2 : 1, call.dx_t[0]);
    }
    if (call.dp_t[0]) {
      const Product products[] = {{call.x[0], call.dy_t}, {call.x_t[0], call.dy}};
      weight_gradient(call, products, call.x_t[0] ? 2 : 1, call.dp_t[0]);
    }
    if (call.dp_t[1]) bias_gradient(call, call.dy_t, call.dp_t[1]);
  }

 private:
  METAAUG_DEVICE static bool linear(const Node& node) {
    const Op& op = node.op;
    return node.in[0].pixels() == 1 && op.kernel.y * op.kernel.x == 1 && op.padding.y == 0 && op.padding.x == 0;
  }

  // A[m, k] or B[k, n] by its strides.
  struct Strides {
    int64_t row, column;
  };

  // C[m, n] = start(n) + the sum of A B over the products, handed to store(m, n, value). A thread makes 2x2 of C, for
  // twice the products of each value read.
  template <class Start, class Store>
  METAAUG_DEVICE static void multiply(int rows, int columns, int depth, const Product* products, int terms, Strides a,
                                      Strides b, const Start& start, const Store& store) {
    const int across = (columns + 1) / 2, down = (rows + 1) / 2;
    each(int64_t{down} * across, [&](int64_t tile) {
      const int m = int(tile / across) * 2, n = int(tile % across) * 2;
      const int m1 = m + 1 < rows ? m + 1 : m, n1 = n + 1 < columns ? n + 1 : n;
      T c00 = start(n), c01 = start(n1), c10 = c00, c11 = c01;
      for (int term = 0; term < terms; ++term) {
        const T *a0 = products[term].a + m * a.row, *a1 = products[term].a + m1 * a.row;
        const T *b0 = products[term].b + n * b.column, *b1 = products[term].b + n1 * b.column;
#if defined(__CUDACC__)
#pragma unroll 4
#endif
        for (int k = 0; k < depth; ++k) {
          const T x0 = a0[k * a.column], x1 = a1[k * a.column], y0 = b0[k * b.row], y1 = b1[k * b.row];
          c00 += x0 * y0;
          c01 += x0 * y1;
          c10 += x1 * y0;
          c11 += x1 * y1;
        }
      }
      store(m, n, c00);
      if (n1 > n) store(m, n1, c01);
      if (m1 > m) store(m1, n, c10);
      if (m1 > m && n1 > n) store(m1, n1, c11);
    });
  }

  // y = bias + sum of inputs and weights.
  METAAUG_DEVICE static void convolve(const OpCall<T>& call, const Product* products, int terms, const T* bias, T* y) {
    const Node& node = *call.node;
    const Op& op = node.op;
    const Shape &in = node.in[0], &out = node.out;
    if (call.tile) return Conv2dTiles<T>(call).convolve(products, terms, bias, y);
    if (linear(node)) {
      const int inputs = in.channels, outputs = out.channels;
      return multiply(
          call.images, outputs, inputs, products, terms, {inputs, 1}, {1, inputs},
          [&](int o) { return value_or(bias, o, T(0)); }, [&](int n, int o, T value) { y[n * outputs + o] = value; });
    }
    const int pixels = out.pixels(), taps = op.kernel.y * op.kernel.x;
    each(call.images * out.size(), [&](int64_t i) {
      const int pixel = int(i % pixels), o = int(i / pixels % out.channels);
      const int64_t first = i / out.size() * in.size();
      const int top = pixel / out.width * op.stride.y - op.padding.y;
      const int left = pixel % out.width * op.stride.x - op.padding.x;
      T sum = value_or(bias, o, T(0));
      for (int term = 0; term < terms; ++term) {
        const T *x = products[term].a + first, *w = products[term].b + int64_t{o} * in.channels * taps;
        for (int c = 0; c < in.channels; ++c, x += in.pixels(), w += taps) {
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
      y[i] = sum;
    });
  }

  // dx (+)= sum of output adjoints and weights.
  METAAUG_DEVICE static void convolve_back(const OpCall<T>& call, const Product* products, int terms, T* dx) {
    const Node& node = *call.node;
    const Op& op = node.op;
    const Shape &in = node.in[0], &out = node.out;
    const bool accumulate = call.accumulate[0];
    if (call.tile) return Conv2dTiles<T>(call).convolve_back(products, terms, dx);
    if (linear(node)) {
      const int inputs = in.channels, outputs = out.channels;
      return multiply(
          call.images, inputs, outputs, products, terms, {outputs, 1}, {inputs, 1}, [](int) { return T(0); },
          [&](int n, int c, T value) { put(dx + n * inputs + c, value, accumulate); });
    }
    const int pixels = in.pixels(), taps = op.kernel.y * op.kernel.x;
    each(call.images * in.size(), [&](int64_t i) {
      const int pixel = int(i % pixels), c = int(i / pixels % in.channels);
      const int64_t first = i / in.size() * out.size();
      const int bottom = pixel / in.width + op.padding.y, right = pixel % in.width + op.padding.x;
      T sum = 0;
      for (int ky = 0; ky < op.kernel.y; ++ky) {
        const int oy = bottom - ky * op.dilation.y;
        if (oy < 0 || oy % op.stride.y || oy / op.stride.y >= out.height) continue;
        for (int kx = 0; kx < op.kernel.x; ++kx) {
          const int ox = right - kx * op.dilation.x;
          if (ox < 0 || ox % op.stride.x || ox / op.stride.x >= out.width) continue;
          const int64_t at = first + oy / op.stride.y * out.width + ox / op.stride.x;
          const int64_t tap = int64_t{c} * taps + ky * op.kernel.x + kx;
          for (int term = 0; term < terms; ++term) {
            const T *dy = products[term].a + at, *w = products[term].b + tap;
            for (int o = 0; o < out.channels; ++o)
              sum += dy[int64_t{o} * out.pixels()] * w[int64_t{o} * in.channels * taps];
          }
        }
      }
      put(dx + i, sum, accumulate);
    });
  }

  // dw += sum of inputs and output adjoints.
  METAAUG_DEVICE static void weight_gradient(const OpCall<T>& call, const Product* products, int terms, T* dw) {
    const Node& node = *call.node;
    const Op& op = node.op;
    const Shape &in = node.in[0], &out = node.out;
    if (call.tile) return Conv2dTiles<T>(call).weight_gradient(products, terms, dw);
    if (linear(node)) {
      const int inputs = in.channels, outputs = out.channels;
      const Product turned[2] = {{products[0].b, products[0].a},
                                 terms > 1 ? Product{products[1].b, products[1].a} : Product{nullptr, nullptr}};
      return multiply(
          outputs, inputs, call.images, turned, terms, {1, outputs}, {inputs, 1}, [](int) { return T(0); },
          [&](int o, int c, T value) { dw[o * inputs + c] += value; });
    }
    const int taps = op.kernel.y * op.kernel.x;
    each(int64_t{out.channels} * in.channels * taps, [&](int64_t i) {
      const int tap = int(i % taps), c = int(i / taps % in.channels), o = int(i / taps / in.channels);
      const int shift_y = tap / op.kernel.x * op.dilation.y - op.padding.y;
      const int shift_x = tap % op.kernel.x * op.dilation.x - op.padding.x;
      T sum = 0;
      for (int term = 0; term < terms; ++term)
        for (int n = 0; n < call.images; ++n) {
          const T* x = products[term].a + n * in.size() + int64_t{c} * in.pixels();
          const T* dy = products[term].b + n * out.size() + int64_t{o} * out.pixels();
          for (int y = 0; y < out.height; ++y) {
            const int iy = y * op.stride.y + shift_y;
            if (iy < 0 || iy >= in.height) continue;
            for (int at = 0; at < out.width; ++at) {
              const int ix = at * op.stride.x + shift_x;
              if (ix >= 0 && ix < in.width) sum += x[iy * in.width + ix] * dy[y * out.width + at];
            }
          }
        }
      dw[i] += sum;
    });
  }

  METAAUG_DEVICE static void bias_gradient(const OpCall<T>& call, const T* dy, T* db) {
    const Shape& out = call.node->out;
    const int pixels = out.pixels();
    each(out.channels, [&](int64_t o) {
      T sum = 0;
      for (int n = 0; n < call.images; ++n)
        for (int pixel = 0; pixel < pixels; ++pixel) sum += dy[n * out.size() + o * pixels + pixel];
      db[o] += sum;
    });
  }
};

}  // namespace metaaug::cuda
