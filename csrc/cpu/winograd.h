// 3x3 convolutions of stride 1 by minimal filtering F(2x2, 3x3) (Lavin and Gray 2016, arXiv 1509.09308): 2x2 outputs
// come from 4x4 inputs by 16 products for each pair of channels, where the direct sum takes 36.
//
//   Y = A^T [ (G W G^T) * (B^T X B) ] A      elementwise in the 16 positions, summed over input channels
//   dW = G^T [ (B^T X B) * (A dY A^T) ] G    summed over tiles
//
// The input gradient is the convolution of dY with the weights turned by half a turn and transposed. Sums, and so
// rounding errors, are no longer than those of the direct way; B and A are made of 0 and +-1, G of 0, 1 and +-1/2.
#pragma once

#include "gemm.h"

namespace metaaug::METAAUG_ISA {

template <class T>
class Winograd {
  using S = Simd<T>;
  using Vector = typename S::Vector;

 public:
  struct Picture {
    int height, width, channels;
    int64_t stride;  // channels padded to the vector
  };

  Winograd() = default;
  // A convolution that reads `a` and writes `c`, with so many rows and columns of zeros before a.
  Winograd(int images, const Picture& a, const Picture& c, int pad_y, int pad_x)
      : a_(a), c_(c), pad_y_(pad_y), pad_x_(pad_x), matrix_{a.channels, c.stride} {
    rows_ = (c.height + 1) / 2;
    columns_ = (c.width + 1) / 2;
    tiles_ = images * rows_ * columns_;
    const int64_t bytes = kPositions * (a.stride + c.stride) * int64_t(sizeof(T));
    block_ = int(std::clamp<int64_t>(kBlockBytes / bytes, 6, std::max(tiles_, 6)));
    a_apart_ = block_ * a.stride + kLine;
    c_apart_ = block_ * c.stride + kLine;
    for (int t = 0; t < block_; ++t) pairs_.push_back({t * a.stride, t * c.stride});
  }

  int tiles() const { return tiles_; }
  int64_t weights() const { return kPositions * matrix_.size(); }  // size of transformed ones
  int64_t scratch() const { return kPositions * (a_apart_ + c_apart_) + a_.stride + c_.stride; }

  // G W G^T of weights in panels [9 * inputs, outputs], turned by half a turn if so asked.
  void transform_weights(const Panels<T>& from, const T* source, bool turn, T* target) const {
    const int64_t inputs = matrix_.rows, apart = matrix_.size();
    for (int p = 0; p < from.count(); ++p) {
      const int64_t width = from.width(p), tap = (turn ? -1 : 1) * inputs * width;
      const T* in = source + from.start(p) + (turn ? 8 * inputs * width : 0);
      T* out = target + matrix_.start(p);
      for (int64_t i = 0; i < inputs * width; i += S::kWidth) {
        Vector half[3][4];
        for (int y = 0; y < 3; ++y) {
          const T* row = in + 3 * y * tap + i;
          expand(S::load(row), S::load(row + tap), S::load(row + 2 * tap), half[y]);
        }
        for (int x = 0; x < 4; ++x) {
          Vector whole[4];
          expand(half[0][x], half[1][x], half[2][x], whole);
          for (int y = 0; y < 4; ++y) S::store(out + (4 * y + x) * apart + i, whole[y]);
        }
      }
    }
  }

  // C (+)= bias + the sum of convolutions of each product's a with its transformed weights b.
  void convolve(const Product<T>* products, int terms, const T* bias, T* c, bool accumulate, T* scratch) const {
    T *x = scratch, *y = x + kPositions * a_apart_, *zeros = y + kPositions * c_apart_, *spare = zeros + a_.stride;
    std::fill(zeros, zeros + a_.stride, T(0));
    for (int first = 0; first < tiles_; first += block_) {
      const int count = std::min(block_, tiles_ - first);
      for (int term = 0; term < terms; ++term) {
        transform_inputs(products[term].a, first, count, zeros, x);
        multiply(x, products[term].b, count, term > 0, y);
      }
      transform_outputs(y, first, count, bias, c, accumulate, spare);
    }
  }

  // dW += the sum over products of the weight gradient of x = a with dY = b; `weights` has room for transformed ones.
  void weight_gradient(const Product<T>* products, int terms, const Panels<T>& of, T* dw, T* weights,
                       T* scratch) const {
    T *x = scratch, *y = x + kPositions * a_apart_, *zeros = y + kPositions * c_apart_;
    std::fill(zeros, zeros + a_.stride + c_.stride, T(0));
    std::fill(weights, weights + this->weights(), T(0));
    for (int term = 0; term < terms; ++term)
      for (int first = 0; first < tiles_; first += block_) {
        const int count = std::min(block_, tiles_ - first);
        transform_inputs(products[term].a, first, count, zeros, x);
        transform_adjoints(products[term].b, first, count, zeros, y);
        multiply_transposed(x, y, count, weights);
      }
    const int64_t inputs = matrix_.rows, apart = matrix_.size();
    for (int p = 0; p < of.count(); ++p) {
      const int64_t width = of.width(p), tap = inputs * width;
      const T* in = weights + matrix_.start(p);
      T* out = dw + of.start(p);
      for (int64_t i = 0; i < inputs * width; i += S::kWidth) {
        Vector half[4][3];
        for (int y = 0; y < 4; ++y) {
          const T* row = in + 4 * y * apart + i;
          contract(S::load(row), S::load(row + apart), S::load(row + 2 * apart), S::load(row + 3 * apart), half[y]);
        }
        for (int x = 0; x < 3; ++x) {
          Vector whole[3];
          contract(half[0][x], half[1][x], half[2][x], half[3][x], whole);
          for (int y = 0; y < 3; ++y) {
            T* at = out + (3 * y + x) * tap + i;
            S::store(at, S::load(at) + whole[y]);
          }
        }
      }
    }
  }

 private:
  static constexpr int kPositions = 16;
  static constexpr int64_t kLine = 64 / sizeof(T);    // keeps positions apart in the cache's sets
  static constexpr int64_t kBlockBytes = 200 * 1024;  // of transformed tiles, to stay in the second cache

  // G w and G^T w
  static void expand(Vector w0, Vector w1, Vector w2, Vector (&out)[4]) {
    const Vector ends = T(0.5) * (w0 + w2), middle = T(0.5) * w1;
    out[0] = w0, out[1] = ends + middle, out[2] = ends - middle, out[3] = w2;
  }
  static void contract(Vector v0, Vector v1, Vector v2, Vector v3, Vector (&out)[3]) {
    const Vector sum = T(0.5) * (v1 + v2);
    out[0] = v0 + sum, out[1] = T(0.5) * (v1 - v2), out[2] = sum + v3;
  }

  // Tile -> its picture's offset and its first row and column in C.
  struct Place {
    int64_t image;
    int y, x;
  };
  Place place(int tile) const {
    const int in_image = rows_ * columns_;
    return {tile / in_image, tile % in_image / columns_ * 2, tile % columns_ * 2};
  }

  // Addresses of kSize x kSize pixels from (y, x) on; `outside` stands for those beyond the picture.
  template <int kSize, class Value>
  static void locate(const Picture& picture, Value* image, int y, int x, Value* outside,
                     Value* (&pixel)[kSize][kSize]) {
    for (int i = 0; i < kSize; ++i)
      for (int j = 0; j < kSize; ++j) {
        const bool inside = y + i >= 0 && y + i < picture.height && x + j >= 0 && x + j < picture.width;
        pixel[i][j] = inside ? image + (int64_t{y + i} * picture.width + x + j) * picture.stride : outside;
      }
  }

  static int64_t size(const Picture& picture) { return int64_t{picture.height} * picture.width * picture.stride; }

  // B^T X B
  void transform_inputs(const T* a, int first, int count, const T* zeros, T* x) const {
    for (int t = 0; t < count; ++t, x += a_.stride) {
      const Place at = place(first + t);
      const T* pixel[4][4];
      locate(a_, a + at.image * size(a_), at.y - pad_y_, at.x - pad_x_, zeros, pixel);
      for (int64_t channel = 0; channel < a_.stride; channel += S::kWidth) {
        Vector half[4][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vector d0 = S::load(pixel[i][0] + channel), d1 = S::load(pixel[i][1] + channel),
                       d2 = S::load(pixel[i][2] + channel), d3 = S::load(pixel[i][3] + channel);
          half[i][0] = d0 - d2, half[i][1] = d1 + d2, half[i][2] = d2 - d1, half[i][3] = d1 - d3;
        }
        T* out = x + channel;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          S::store(out + j * a_apart_, half[0][j] - half[2][j]);
          S::store(out + (4 + j) * a_apart_, half[1][j] + half[2][j]);
          S::store(out + (8 + j) * a_apart_, half[2][j] - half[1][j]);
          S::store(out + (12 + j) * a_apart_, half[1][j] - half[3][j]);
        }
      }
    }
  }

  // A^T Y A
  void transform_outputs(const T* y, int first, int count, const T* bias, T* c, bool accumulate, T* spare) const {
    for (int t = 0; t < count; ++t, y += c_.stride) {
      const Place at = place(first + t);
      T* pixel[2][2];
      locate(c_, c + at.image * size(c_), at.y, at.x, spare, pixel);
      for (int64_t channel = 0; channel < c_.stride; channel += S::kWidth) {
        const T* in = y + channel;
        const Vector start = bias ? S::load(bias + channel) : Vector{};
        Vector half[2][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const Vector m0 = S::load(in + j * c_apart_), m1 = S::load(in + (4 + j) * c_apart_),
                       m2 = S::load(in + (8 + j) * c_apart_), m3 = S::load(in + (12 + j) * c_apart_);
          half[0][j] = m0 + (m1 + m2), half[1][j] = (m1 - m2) - m3;
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const Vector *h = half[i], middle = h[1] + h[2], difference = h[1] - h[2];
          T *left = pixel[i][0] + channel, *right = pixel[i][1] + channel;
          S::store(left, (accumulate ? S::load(left) + start : start) + (h[0] + middle));
          S::store(right, (accumulate ? S::load(right) + start : start) + (difference - h[3]));
        }
      }
    }
  }

  // A dY A^T
  void transform_adjoints(const T* dy, int first, int count, const T* zeros, T* y) const {
    for (int t = 0; t < count; ++t, y += c_.stride) {
      const Place at = place(first + t);
      const T* pixel[2][2];
      locate(c_, dy + at.image * size(c_), at.y, at.x, zeros, pixel);
      for (int64_t channel = 0; channel < c_.stride; channel += S::kWidth) {
        Vector half[4][2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const Vector above = S::load(pixel[0][j] + channel), below = S::load(pixel[1][j] + channel);
          half[0][j] = above, half[1][j] = above + below, half[2][j] = above - below, half[3][j] = -below;
        }
        T* out = y + channel;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          S::store(out + 4 * i * c_apart_, half[i][0]);
          S::store(out + (4 * i + 1) * c_apart_, half[i][0] + half[i][1]);
          S::store(out + (4 * i + 2) * c_apart_, half[i][0] - half[i][1]);
          S::store(out + (4 * i + 3) * c_apart_, -half[i][1]);
        }
      }
    }
  }

  // y (+)= x weights in each position, [tiles, inputs] by [inputs, outputs].
  void multiply(const T* x, const T* weights, int count, bool accumulate, T* y) const {
    const Segment whole{0, 0, a_.channels};
    for (int position = 0; position < kPositions; ++position) {
      const Product<T> product{x + position * a_apart_, weights + position * matrix_.size()};
      for (int p = 0; p < matrix_.count(); ++p) {
        const int vectors = matrix_.width(p) / S::kWidth;
        const auto& kernels = Tiles<T>::table().gather[vectors - 1];
        T* out = y + position * c_apart_ + int64_t{p} * Panels<T>::kColumns;
        each_tile(count, tile_rows(vectors), [&](int first, int rows) {
          kernels[rows - 1](&whole, 1, &product, 1, first * a_.stride, a_.stride, matrix_.start(p), nullptr,
                            out + first * c_.stride, c_.stride, accumulate);
        });
      }
    }
  }

  // weights += x^T y in each position.
  void multiply_transposed(const T* x, const T* y, int count, T* weights) const {
    const Pixels tiles{pairs_.data(), count, 1, 0, 0};
    for (int position = 0; position < kPositions; ++position) {
      const Product<T> product{x + position * a_apart_, y + position * c_apart_};
      for (int p = 0; p < matrix_.count(); ++p) {
        const int width = matrix_.width(p), vectors = width / S::kWidth;
        const auto& kernels = Tiles<T>::table().outer[vectors - 1];
        T* out = weights + position * matrix_.size() + matrix_.start(p);
        each_tile(a_.channels, tile_rows(vectors), [&](int first, int rows) {
          kernels[rows - 1](tiles, &product, 1, first, int64_t{p} * Panels<T>::kColumns, out + int64_t{first} * width);
        });
      }
    }
  }

  Picture a_{}, c_{};
  int pad_y_ = 0, pad_x_ = 0, rows_ = 0, columns_ = 0, tiles_ = 0, block_ = 0;
  int64_t a_apart_ = 0, c_apart_ = 0;
  Panels<T> matrix_{};            // of one position
  std::vector<PixelPair> pairs_;  // the tiles of a block in x and y
};

}  // namespace metaaug::METAAUG_ISA
