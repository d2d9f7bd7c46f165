// Linear layers whose matrices lie in shared memory, where what counts is how often it is read, and how wide: 16 bytes
// at a time where the sizes allow it.
#pragma once

#include "tile.h"

namespace metaaug::cuda {

template <class T>
struct Linear {
  // store(sample, output, bias and the sum of inputs and weights)
  template <class Store>
  METAAUG_DEVICE static void convolve(int images, int inputs, int outputs, const Product<T>* products, int terms,
                                      const T* bias, const Store& store) {
    if (!by_fours(products, terms, inputs, true))
      return multiply(
          images, outputs, inputs, products, terms, {inputs, 1}, {1, inputs},
          [&](int o) { return value_or(bias, o, T(0)); }, store);
    const int across = (outputs + 1) / 2;
    each(images * across, [&](int i) {  // two outputs, four inputs at a time
      const int n = i / across, o = i - n * across, o1 = o + across < outputs ? o + across : o;
      T sum = value_or(bias, o, T(0)), sum1 = value_or(bias, o1, T(0));
      for (int term = 0; term < terms; ++term) {
        const T *x = in_shared(products[term].a) + n * inputs, *w = in_shared(products[term].b);
#if defined(__CUDACC__)
#pragma unroll 2
#endif
        for (int c = 0; c < inputs; c += 4) {
          const Four here = read(x + c), weights = read(w + o * inputs + c), weights1 = read(w + o1 * inputs + c);
          for (int k = 0; k < 4; ++k) {
            sum += here.v[k] * weights.v[k];
            sum1 += here.v[k] * weights1.v[k];
          }
        }
      }
      store(n, o, sum);
      if (o1 > o) store(n, o1, sum1);
    });
  }

  // store(sample, input, sum of output adjoints and weights)
  template <class Store>
  METAAUG_DEVICE static void convolve_back(int images, int inputs, int outputs, const Product<T>* products, int terms,
                                           const Store& store) {
    if (!by_fours(products, terms, inputs, false))
      return multiply(
          images, inputs, outputs, products, terms, {outputs, 1}, {inputs, 1}, [](int) { return T(0); }, store);
    const int across = inputs / 4;
    each(images * across, [&](int i) {  // four inputs
      const int n = i / across, c = (i - n * across) * 4;
      T sums[4] = {};
      for (int term = 0; term < terms; ++term) {
        const T *dy = in_shared(products[term].a) + n * outputs, *w = in_shared(products[term].b) + c;
#if defined(__CUDACC__)
#pragma unroll 4
#endif
        for (int o = 0; o < outputs; ++o) {
          const T here = dy[o];
          const Four weights = read(w + o * inputs);
          for (int k = 0; k < 4; ++k) sums[k] += here * weights.v[k];
        }
      }
      for (int k = 0; k < 4; ++k) store(n, c + k, sums[k]);
    });
  }

  // store(output, input, sum of output adjoints and inputs)
  template <class Store>
  METAAUG_DEVICE static void weight_gradient(int images, int inputs, int outputs, const Product<T>* products, int terms,
                                             const Store& store) {
    if (!by_fours(products, terms, inputs, false))
      return multiply(
          outputs, inputs, images, products, terms, {1, outputs}, {inputs, 1}, [](int) { return T(0); }, store);
    const int across = inputs / 4, down = (outputs + 1) / 2;
    each(down * across, [&](int i) {  // two outputs, four inputs
      const int o = i / across, c = (i - o * across) * 4, o1 = o + down < outputs ? o + down : o;
      T sums[2][4] = {};
      for (int term = 0; term < terms; ++term) {
        const T *dy = in_shared(products[term].a), *x = in_shared(products[term].b) + c;
#if defined(__CUDACC__)
#pragma unroll 2
#endif
        for (int n = 0; n < images; ++n) {
          const T one = dy[n * outputs + o], other = dy[n * outputs + o1];
          const Four here = read(x + n * inputs);
          for (int k = 0; k < 4; ++k) {
            sums[0][k] += one * here.v[k];
            sums[1][k] += other * here.v[k];
          }
        }
      }
      for (int k = 0; k < 4; ++k) {
        store(o, c + k, sums[0][k]);
        if (o1 > o) store(o1, c + k, sums[1][k]);
      }
    });
  }

 private:
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
    T v[4];
  };
  METAAUG_DEVICE static Four read(const T* at) { return *reinterpret_cast<const Four*>(at); }

  // Whether rows of so many elements, of `b` and maybe of `a`, can be read by fours.
  METAAUG_DEVICE static bool by_fours(const Product<T>* products, int terms, int row, bool a_too) {
    const auto aligned = [](const T* array) { return reinterpret_cast<uintptr_t>(array) % alignof(Four) == 0; };
    bool all = row % 4 == 0;
    for (int term = 0; term < terms; ++term) all &= aligned(products[term].b) && (!a_too || aligned(products[term].a));
    return all;
  }

  // A[m, k] or B[k, n] by its strides.
  struct Strides {
    int row, column;
  };

  // Any sizes: C[m, n] = start(n) + the sum of A B over the products. A thread makes 2x2 of C. Neighbouring threads
  // read B at neighbouring n; where these lie an even number of elements apart, each begins at another k, so that they
  // do not all want the same bank of memory.
  template <class Start, class Store>
  METAAUG_DEVICE static void multiply(int rows, int columns, int depth, const Product<T>* products, int terms,
                                      Strides a, Strides b, const Start& start, const Store& store) {
    const int across = (columns + 1) / 2, down = (rows + 1) / 2;
    each(down * across, [&](int tile) {
      const int m = tile / across, n = tile - m * across;
      const int m1 = m + down < rows ? m + down : m, n1 = n + across < columns ? n + across : n;
      const int begin = b.column % 2 == 0 ? n % depth : 0;
      T c00 = start(n), c01 = start(n1), c10 = c00, c11 = c01;
      for (int term = 0; term < terms; ++term) {
        const T *a0 = in_shared(products[term].a) + m * a.row, *a1 = in_shared(products[term].a) + m1 * a.row;
        const T *b0 = in_shared(products[term].b) + n * b.column, *b1 = in_shared(products[term].b) + n1 * b.column;
        const auto add = [&](int from, int to) {
#if defined(__CUDACC__)
#pragma unroll 4
#endif
          for (int k = from; k < to; ++k) {
            const T x0 = a0[k * a.column], x1 = a1[k * a.column], y0 = b0[k * b.row], y1 = b1[k * b.row];
            c00 += x0 * y0;
            c01 += x0 * y1;
            c10 += x1 * y0;
            c11 += x1 * y1;
          }
        };
        add(begin, depth);
        add(0, begin);
      }
      store(m, n, c00);
      if (n1 > n) store(m, n1, c01);
      if (m1 > m) store(m1, n, c10);
      if (m1 > m && n1 > n) store(m1, n1, c11);
    });
  }
};

}  // namespace metaaug::cuda
