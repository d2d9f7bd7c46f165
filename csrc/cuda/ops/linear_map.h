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
    each(call.size(), [&](int64_t i) { y[i] = x[0][i]; });
  }
  METAAUG_DEVICE static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (dx[0]) each(call.size(), [&](int64_t i) { put(dx[0] + i, dy[i], call.accumulate[0]); });
  }
};

template <class T>
struct Add {
  METAAUG_DEVICE static void prepare(const OpCall<T>&) {}
  METAAUG_DEVICE static void map(const OpCall<T>& call, const T* const* x, T* y) {
    each(call.size(), [&](int64_t i) { y[i] = value_or(x[0], i, T(0)) + value_or(x[1], i, T(0)); });
  }
  // Both inputs may be the same value: then one adds to what the other wrote.
  METAAUG_DEVICE static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    for (int j = 0; j < 2; ++j)
      if (dx[j]) each(call.size(), [&](int64_t i) { put(dx[j] + i, dy[i], call.accumulate[j]); });
  }
};

// The mask, scaled by 1 / (1 - p), is drawn by counter in the user's element order; the thread that draws an element of
// it uses it.
template <class T>
struct Dropout {
  METAAUG_DEVICE static void prepare(const OpCall<T>& call) {
    const double p = call.node->op.scalar[0];
    const T scale = p < 1 ? T(1 / (1 - p)) : T(0);
    each(call.size(), [&](int64_t i) { call.saved[i] = dropout_uniform(call.key, uint32_t(i)) >= p ? scale : T(0); });
  }
  METAAUG_DEVICE static void map(const OpCall<T>& call, const T* const* x, T* y) {
    each(call.size(), [&](int64_t i) { y[i] = x[0][i] * call.saved[i]; });
  }
  METAAUG_DEVICE static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (dx[0]) each(call.size(), [&](int64_t i) { put(dx[0] + i, dy[i] * call.saved[i], call.accumulate[0]); });
  }
};

// A pool's windows: which input a tap of an output reads, and which output reads an input by a tap; -1 is none.
struct Windows {
  const Op& op;
  const Shape &in, &out;

  METAAUG_DEVICE explicit Windows(const Node& node) : op(node.op), in(node.in[0]), out(node.out) {}
  METAAUG_DEVICE int taps() const { return op.kernel.y * op.kernel.x; }
  METAAUG_DEVICE int input(int pixel, int tap) const {
    const int y = pixel / out.width * op.stride.y - op.padding.y + tap / op.kernel.x;
    const int x = pixel % out.width * op.stride.x - op.padding.x + tap % op.kernel.x;
    return y < 0 || y >= in.height || x < 0 || x >= in.width ? -1 : y * in.width + x;
  }
  METAAUG_DEVICE int output(int pixel, int tap) const {
    const int y = pixel / in.width + op.padding.y - tap / op.kernel.x;
    const int x = pixel % in.width + op.padding.x - tap % op.kernel.x;
    if (y < 0 || y % op.stride.y || y / op.stride.y >= out.height) return -1;
    if (x < 0 || x % op.stride.x || x / op.stride.x >= out.width) return -1;
    return y / op.stride.y * out.width + x / op.stride.x;
  }

  // Calls body(index, the start of its channel at the other side, its pixel) for every pixel of all channels.
  template <class Body>
  METAAUG_DEVICE static void each_pixel(int images, const Shape& here, const Shape& there, const Body& body) {
    const int pixels = here.pixels(), others = there.pixels();
    each(images * here.size(), [&](int64_t i) { body(i, i / pixels * others, int(i % pixels)); });
  }
};

// saved: the chosen tap of every output. The first of equal maxima wins, and NaN wins over all, as in torch.
template <class T>
struct MaxPool {
  METAAUG_DEVICE static void prepare(const OpCall<T>& call) {
    const Windows windows(*call.node);
    const T* x = call.x[0];
    windows.each_pixel(call.images, windows.out, windows.in, [&](int64_t i, int64_t plane, int pixel) {
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
    const Windows windows(*call.node);
    windows.each_pixel(call.images, windows.out, windows.in, [&](int64_t i, int64_t plane, int pixel) {
      y[i] = x[0][plane + windows.input(pixel, int(call.saved[i]))];
    });
  }
  METAAUG_DEVICE static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (!dx[0]) return;
    const Windows windows(*call.node);
    windows.each_pixel(call.images, windows.in, windows.out, [&](int64_t i, int64_t plane, int pixel) {
      T sum = 0;
      for (int tap = 0; tap < windows.taps(); ++tap) {
        const int from = windows.output(pixel, tap);
        if (from >= 0 && call.saved[plane + from] == T(tap)) sum += dy[plane + from];
      }
      put(dx[0] + i, sum, call.accumulate[0]);
    });
  }
};

// Mean over each window: its size with padding, or the number of real pixels.
template <class T>
struct AvgPool {
  METAAUG_DEVICE static void prepare(const OpCall<T>&) {}
  METAAUG_DEVICE static void map(const OpCall<T>& call, const T* const* x, T* y) {
    const Windows windows(*call.node);
    windows.each_pixel(call.images, windows.out, windows.in, [&](int64_t i, int64_t plane, int pixel) {
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
    const Windows windows(*call.node);
    windows.each_pixel(call.images, windows.in, windows.out, [&](int64_t i, int64_t plane, int pixel) {
      T sum = 0;
      for (int tap = 0; tap < windows.taps(); ++tap) {
        const int from = windows.output(pixel, tap);
        if (from >= 0) sum += share(windows, from) * dy[plane + from];
      }
      put(dx[0] + i, sum, call.accumulate[0]);
    });
  }

 private:
  METAAUG_DEVICE static T share(const Windows& windows, int pixel) {
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
    each(call.size(), [&](int64_t i) {
      T sum = 0;
      for (int pixel = 0; pixel < pixels; ++pixel) sum += x[0][i * pixels + pixel];
      y[i] = sum / T(pixels);
    });
  }
  METAAUG_DEVICE static void adjoint(const OpCall<T>& call, const T* dy, T* const* dx) {
    if (!dx[0]) return;
    const int pixels = call.node->in[0].pixels();
    each(call.size() * pixels, [&](int64_t i) { put(dx[0] + i, dy[i / pixels] / T(pixels), call.accumulate[0]); });
  }
};

}  // namespace metaaug::cuda
