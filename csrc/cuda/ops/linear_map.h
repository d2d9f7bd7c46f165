// Ops that are linear in x with no parameters: `map` makes y from x, and with it y_t from x_t; `adjoint` makes dx from
// dy, and with it dx_t from dy_t. `prepare` writes what both read. A thread gathers what it writes, so nothing is added
// by two.
#pragma once

#include "op.h"

namespace metaaug::cuda {

template <class T>
struct Flatten {
  METAAUG_DEVICE static void prepare(const OpCall<T>&) {}
  METAAUG_DEVICE static void map(const OpCall<T>& call, const T* const* x, T* y) {
    each(call.size(), [&](int i) { y[i] = x[0][i]; });
  }
  METAAUG_DEVICE static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (dx[0]) each(call.size(), [&](int i) { call.put_adjoint(dx, 0, i, dy[i]); });
  }
};

template <class T>
struct Add {
  METAAUG_DEVICE static void prepare(const OpCall<T>&) {}
  METAAUG_DEVICE static void map(const OpCall<T>& call, const T* const* x, T* y) {
    each(call.size(), [&](int i) { y[i] = value_or(x[0], i, T(0)) + value_or(x[1], call.second(i), T(0)); });
  }
  // Both inputs may be the same value: then one adds to what the other wrote.
  METAAUG_DEVICE static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (dx[0]) each(call.size(), [&](int i) { call.put_adjoint(dx, 0, i, dy[i]); });
    if (dx[1]) call.put_second(dx, [&](int i) { return dy[i]; });
  }
};

// The mask, scaled by 1 / (1 - p), is drawn by counter in the user's element order; the thread that draws an element of
// it uses it.
template <class T>
struct Dropout {
  METAAUG_DEVICE static void prepare(const OpCall<T>& call) {
    const double p = call.node->op.scalar[0];
    const T scale = p < 1 ? T(1 / (1 - p)) : T(0);
    each(call.size(), [&](int i) { call.saved[i] = dropout_uniform(call.key, uint32_t(i)) >= p ? scale : T(0); });
  }
  METAAUG_DEVICE static void map(const OpCall<T>& call, const T* const* x, T* y) {
    each(call.size(), [&](int i) { y[i] = x[0][i] * call.saved[i]; });
  }
  METAAUG_DEVICE static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (dx[0]) each(call.size(), [&](int i) { call.put_adjoint(dx, 0, i, dy[i] * call.saved[i]); });
  }
};

// A pool's windows: which input a tap of an output reads, and which output reads an input by a tap; -1 is none.
struct PoolWindows {
  const Node& node;
  const Op& op;
  const Shape &in, &out;

  METAAUG_DEVICE explicit PoolWindows(const Node& node) : node(node), op(node.op), in(node.in[0]), out(node.out) {}
  METAAUG_DEVICE int taps() const { return op.kernel.y * op.kernel.x; }
  METAAUG_DEVICE int input(int pixel, int tap) const {
    const int row = node.by_out_width(pixel), ky = tap / op.kernel.x;
    const int y = row * op.stride.y - op.padding.y + ky;
    const int x = node.by_out_width.rest(pixel, row) * op.stride.x - op.padding.x + tap - ky * op.kernel.x;
    return y < 0 || y >= in.height || x < 0 || x >= in.width ? -1 : y * in.width + x;
  }
  METAAUG_DEVICE int output(int pixel, int tap) const {
    const int row = node.by_in_width(pixel), ky = tap / op.kernel.x;
    const int y = row + op.padding.y - ky;
    const int x = node.by_in_width.rest(pixel, row) + op.padding.x - (tap - ky * op.kernel.x);
    if (y < 0 || x < 0) return -1;
    const int to_y = node.by_stride_y(y), to_x = node.by_stride_x(x);
    if (node.by_stride_y.rest(y, to_y) || node.by_stride_x.rest(x, to_x)) return -1;
    return to_y >= out.height || to_x >= out.width ? -1 : to_y * out.width + to_x;
  }

  // Calls body(index, the start of its channel at the other side, its pixel) for all pixels of outputs, or of inputs.
  template <class Body>
  METAAUG_DEVICE void each_output(int images, const Body& body) const {
    each_pixel(images * out.size(), node.by_out_pixels, in.pixels(), body);
  }
  template <class Body>
  METAAUG_DEVICE void each_input(int images, const Body& body) const {
    each_pixel(images * in.size(), node.by_in_pixels, out.pixels(), body);
  }

 private:
  template <class Body>
  METAAUG_DEVICE static void each_pixel(int64_t count, const Divide& by_pixels, int others, const Body& body) {
    each(count, [&](int i) {
      const int plane = by_pixels(i);
      body(i, plane * others, by_pixels.rest(i, plane));
    });
  }
};

// saved: the chosen tap of every output. The first of equal maxima wins, and NaN wins over all, as in torch.
template <class T>
struct MaxPool {
  METAAUG_DEVICE static void prepare(const OpCall<T>& call) {
    const PoolWindows windows(*call.node);
    const T* x = call.x[0];
    windows.each_output(call.images, [&](int i, int plane, int pixel) {
      int choice = -1;
      T best = 0;
      for (int tap = 0; tap < windows.taps(); ++tap) {
        const int from = windows.input(pixel, tap);
        if (from < 0) continue;
        const T value = x[plane + from];
        if (choice >= 0 && !(value > best) && value == value) continue;
        best = value;
        choice = tap;
      }
      call.saved[i] = T(choice);
    });
  }
  METAAUG_DEVICE static void map(const OpCall<T>& call, const T* const* x, T* y) {
    const PoolWindows windows(*call.node);
    windows.each_output(call.images, [&](int i, int plane, int pixel) {
      y[i] = x[0][plane + windows.input(pixel, int(call.saved[i]))];
    });
  }
  METAAUG_DEVICE static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (!dx[0]) return;
    const PoolWindows windows(*call.node);
    windows.each_input(call.images, [&](int i, int plane, int pixel) {
      T sum = 0;
      for (int tap = 0; tap < windows.taps(); ++tap) {
        const int from = windows.output(pixel, tap);
        if (from >= 0 && call.saved[plane + from] == T(tap)) sum += dy[plane + from];
      }
      call.put_adjoint(dx, 0, i, sum);
    });
  }
};

// Mean over each window: its size with padding, or the number of real pixels.
template <class T>
struct AvgPool {
  METAAUG_DEVICE static void prepare(const OpCall<T>&) {}
  METAAUG_DEVICE static void map(const OpCall<T>& call, const T* const* x, T* y) {
    const PoolWindows windows(*call.node);
    windows.each_output(call.images, [&](int i, int plane, int pixel) {
      T sum = 0;
      for (int tap = 0; tap < windows.taps(); ++tap) {
        const int from = windows.input(pixel, tap);
        if (from >= 0) sum += x[0][plane + from];
      }
      y[i] = sum * share(windows, pixel);
    });
  }
  METAAUG_DEVICE static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (!dx[0]) return;
    const PoolWindows windows(*call.node);
    windows.each_input(call.images, [&](int i, int plane, int pixel) {
      T sum = 0;
      for (int tap = 0; tap < windows.taps(); ++tap) {
        const int from = windows.output(pixel, tap);
        if (from >= 0) sum += share(windows, from) * dy[plane + from];
      }
      call.put_adjoint(dx, 0, i, sum);
    });
  }

 private:
  METAAUG_DEVICE static T share(const PoolWindows& windows, int pixel) {
    int real = 0;
    for (int tap = 0; tap < windows.taps(); ++tap) real += windows.input(pixel, tap) >= 0;
    return T(1) / T(windows.op.count_padding ? windows.taps() : real);
  }
};

// Mean over the whole picture.
template <class T>
struct MeanPool {
  METAAUG_DEVICE static void prepare(const OpCall<T>&) {}
  METAAUG_DEVICE static void map(const OpCall<T>& call, const T* const* x, T* y) {
    const int pixels = call.node->in[0].pixels();
    each(call.size(), [&](int i) {
      T sum = 0;
      for (int pixel = 0; pixel < pixels; ++pixel) sum += x[0][i * pixels + pixel];
      y[i] = sum / T(pixels);
    });
  }
  METAAUG_DEVICE static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (!dx[0]) return;
    const int pixels = call.node->in[0].pixels();
    each(call.size() * pixels, [&](int i) { call.put_adjoint(dx, 0, i, dy[call.node->by_in_pixels(i)] / T(pixels)); });
  }
};

}  // namespace metaaug::cuda
