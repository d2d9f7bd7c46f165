// conv2d, and linear as its 1x1 case on a 1x1 picture.
#pragma once

#include "narrow.h"

namespace metaaug::METAAUG_ISA {
namespace conv2d {

// Where one pixel of C reads A: a list of segments relative to the image's start.
struct Pixel {
  int64_t c;
  std::vector<Segment> segments;
};

// Pixel b continues a run at distance `shift` in A.
inline bool continues(const Pixel& a, const Pixel& b, int64_t shift) {
  return std::equal(a.segments.begin(), a.segments.end(), b.segments.begin(), b.segments.end(),
                    [&](const Segment& s, const Segment& t) {
                      return t.a - s.a == shift && s.b_row == t.b_row && s.length == t.length;
                    });
}

// Rows of a tile are one pixel over the images where there are enough of them (their segments then agree at the
// picture's border too), else neighbouring pixels of one image. `pixels` holds rows of equal `phase` in order.
inline GatherPlan gather_plan(const std::vector<std::vector<Pixel>>& chains, int images, int64_t a_image,
                              int64_t c_image) {
  GatherPlan plan;
  const bool over_images = images >= 4 || (chains.size() == 1 && chains[0].size() == 1);
  for (const auto& chain : chains) {
    for (size_t first = 0; first < chain.size();) {
      size_t last = first + 1;
      int64_t shift = 0;
      if (!over_images && last < chain.size() && !chain[first].segments.empty() && !chain[last].segments.empty()) {
        shift = chain[last].segments[0].a - chain[first].segments[0].a;
        while (last < chain.size() && continues(chain[last - 1], chain[last], shift)) ++last;
      }
      const int at = int(plan.segments.size()), count = int(chain[first].segments.size());
      plan.segments.insert(plan.segments.end(), chain[first].segments.begin(), chain[first].segments.end());
      if (over_images) {
        plan.runs.push_back({images, 0, a_image, chain[first].c, c_image, at, count});
      } else {
        const int64_t step = last - first > 1 ? chain[first + 1].c - chain[first].c : 0;
        for (int n = 0; n < images; ++n)
          plan.runs.push_back({int(last - first), n * a_image, shift, n * c_image + chain[first].c, step, at, count});
      }
      first = last;
    }
  }
  return plan;
}

// That of a 1x1 convolution of stride 1: pixels of all images in order.
inline GatherPlan pointwise_plan(int64_t rows, int inputs, int64_t a_stride, int64_t c_stride) {
  constexpr int64_t kAtOnce = 60;  // what fits in the first cache, in whole tiles
  GatherPlan plan{{}, {{0, 0, inputs}}};
  for (int64_t row = 0; row < rows; row += kAtOnce)
    plan.runs.push_back({int(std::min(kAtOnce, rows - row)), row * a_stride, a_stride, row * c_stride, c_stride, 0, 1});
  return plan;
}

// Where minimal filtering has this many times fewer products than the direct way, it is faster.
inline constexpr double kWinogradGain = 1.25;

// So few weights are kept transposed from the backward pass to its tangent: in small nets that is a tenth of a step.
inline constexpr int64_t kFewWeights = 4096;

// A picture of one to three pixels or channels has too few products to pay for the transforms.
template <class T>
void plan_winograd(OpPlan<T>& plan) {
  const Op& op = plan.op;
  const auto is = [](Pair pair, int value) { return pair.y == value && pair.x == value; };
  const Layout &in = plan.in[0], &out = plan.out;
  if (!is(op.kernel, 3) || !is(op.stride, 1) || !is(op.dilation, 1) || op.padding.y > 2 || op.padding.x > 2) return;
  if (in.shape.channels < 2 * Simd<T>::kWidth || out.shape.channels < 2 * Simd<T>::kWidth) return;
  if (in.stride % Simd<T>::kWidth) return;
  int64_t direct = 0;
  for (const auto& pairs : plan.weight_gradient.taps) direct += int64_t(pairs.size());
  const auto picture = [](const Layout& layout) {
    return typename Winograd<T>::Picture{layout.shape.height, layout.shape.width, layout.shape.channels, layout.stride};
  };
  plan.forward_tiles = {plan.images, picture(in), picture(out), op.padding.y, op.padding.x};
  plan.input_gradient_tiles = {plan.images, picture(out), picture(in), 2 - op.padding.y, 2 - op.padding.x};
  const int64_t tiles = std::max(plan.forward_tiles.tiles(), plan.input_gradient_tiles.tiles());
  plan.winograd = double(direct * plan.images) >= kWinogradGain * 16 * double(tiles) && tiles >= 16;
  if (!plan.winograd) return;
  plan.scratch += 2 * std::max(plan.forward_tiles.weights(), plan.input_gradient_tiles.weights());
  plan.scratch += std::max(plan.forward_tiles.scratch(), plan.input_gradient_tiles.scratch());
}

// What each pixel of the output reads: rows of pixels.
template <class T>
std::vector<std::vector<Pixel>> output_pixels(const OpPlan<T>& plan) {
  const Op& op = plan.op;
  const Layout &in = plan.in[0], &out = plan.out;
  const int inputs = in.shape.channels;
  std::vector<std::vector<Pixel>> chains(out.shape.height);
  for (int y = 0; y < out.shape.height; ++y) {
    for (int x = 0; x < out.shape.width; ++x) {
      Pixel pixel{(int64_t{y} * out.shape.width + x) * out.stride, {}};
      for (int tap = 0; tap < op.kernel.y * op.kernel.x; ++tap) {
        const int iy = y * op.stride.y - op.padding.y + tap / op.kernel.x * op.dilation.y;
        const int ix = x * op.stride.x - op.padding.x + tap % op.kernel.x * op.dilation.x;
        if (iy < 0 || iy >= in.shape.height || ix < 0 || ix >= in.shape.width) continue;
        pixel.segments.push_back({(int64_t{iy} * in.shape.width + ix) * in.stride, tap * inputs, inputs});
      }
      chains[y].push_back(std::move(pixel));
    }
  }
  return chains;
}

// What the gradient of each input pixel reads: the output pixels that read it; inputs a stride apart read alike.
template <class T>
std::vector<std::vector<Pixel>> input_pixels(const OpPlan<T>& plan) {
  const Op& op = plan.op;
  const Layout &in = plan.in[0], &out = plan.out;
  const int outputs = out.shape.channels;
  std::vector<std::vector<Pixel>> chains;
  for (int iy = 0; iy < in.shape.height; ++iy) {
    for (int phase = 0; phase < std::min(op.stride.x, in.shape.width); ++phase) {
      chains.emplace_back();
      for (int ix = phase; ix < in.shape.width; ix += op.stride.x) {
        Pixel pixel{(int64_t{iy} * in.shape.width + ix) * in.stride, {}};
        for (int tap = 0; tap < op.kernel.y * op.kernel.x; ++tap) {
          const int oy = iy + op.padding.y - (tap / op.kernel.x) * op.dilation.y;
          const int ox = ix + op.padding.x - (tap % op.kernel.x) * op.dilation.x;
          if (oy < 0 || ox < 0 || oy % op.stride.y || ox % op.stride.x) continue;
          if (oy / op.stride.y >= out.shape.height || ox / op.stride.x >= out.shape.width) continue;
          const int64_t a = (int64_t{oy / op.stride.y} * out.shape.width + ox / op.stride.x) * out.stride;
          pixel.segments.push_back({a, tap * outputs, outputs});
        }
        chains.back().push_back(std::move(pixel));
      }
    }
  }
  return chains;
}

// Segments that follow each other in A and B become one.
inline void join_segments(std::vector<std::vector<Pixel>>& chains) {
  for (auto& chain : chains)
    for (Pixel& pixel : chain) {
      std::vector<Segment> joined;
      for (const Segment& segment : pixel.segments) {
        const Segment* last = joined.empty() ? nullptr : &joined.back();
        if (last && last->a + last->length == segment.a && last->b_row + last->length == segment.b_row)
          joined.back().length += segment.length;
        else
          joined.push_back(segment);
      }
      pixel.segments = std::move(joined);
    }
}

template <class T>
void plan(OpPlan<T>& plan) {
  const Op& op = plan.op;
  const Layout &in = plan.in[0], &out = plan.out;
  const int inputs = in.shape.channels, outputs = out.shape.channels, taps = op.kernel.y * op.kernel.x;
  plan.matrix = {int64_t{taps} * inputs, pad<T>(outputs)};
  plan.transposed = {int64_t{taps} * outputs, pad<T>(inputs)};
  if (plan.wants_dx) plan.scratch = 2 * plan.transposed.size();
  const bool pointwise = taps == 1 && op.stride.y == 1 && op.stride.x == 1 && op.padding.y == 0 && op.padding.x == 0;
  const bool linear = pointwise && in.shape.pixels() == 1;
  if (linear) {
    plan.keeps_transposed = plan.moves && !plan.narrow && plan.transposed.size() <= kFewWeights;
    if (plan.keeps_transposed) plan.saved = plan.transposed.size();
  }
  if (pointwise) {
    // One loop over the images of a linear layer, and over the pixels of each image otherwise.
    const int pairs = linear ? plan.images : in.shape.pixels();
    plan.weight_gradient = {{{}}, linear ? 1 : plan.images, in.sample(), out.sample()};
    for (int i = 0; i < pairs; ++i) plan.weight_gradient.taps[0].push_back({i * in.stride, i * out.stride});
    plan.forward = pointwise_plan(plan.rows(), inputs, in.stride, out.stride);
    plan.input_gradient = pointwise_plan(plan.rows(), outputs, out.stride, in.stride);
    return;
  }
  std::vector<std::vector<Pixel>> chains = output_pixels(plan);
  plan.weight_gradient = {std::vector<std::vector<PixelPair>>(taps), plan.images, in.sample(), out.sample()};
  for (const auto& chain : chains)
    for (const Pixel& pixel : chain)
      for (const Segment& read : pixel.segments)
        plan.weight_gradient.taps[read.b_row / inputs].push_back({read.a, pixel.c});
  join_segments(chains);
  plan.forward = gather_plan(chains, plan.images, in.sample(), out.sample());
  plan.input_gradient = gather_plan(input_pixels(plan), plan.images, out.sample(), in.sample());
  plan_winograd(plan);
}

// C (+)= bias + products, of inputs and weights: the forward and its tangent.
template <class T>
void convolve(const OpCall<T>& call, Product<T>* products, int terms, const T* bias, T* c) {
  const OpPlan<T>& plan = call.plan;
  if (plan.narrow) return narrow::products(plan, products, terms, bias, c);
  // Without a product, the bias alone is left, which the direct way spreads.
  if (!plan.winograd || terms == 0) return gather<T>(plan.forward, plan.matrix, products, terms, bias, c, false);
  T* scratch = call.scratch;
  for (int term = 0; term < terms; ++term, scratch += plan.forward_tiles.weights()) {
    plan.forward_tiles.transform_weights(plan.matrix, products[term].b, false, scratch);
    products[term].b = scratch;
  }
  plan.forward_tiles.convolve(products, terms, bias, c, false, scratch);
}

// dx (+)= products of output adjoints and weights.
template <class T>
void convolve_back(const OpCall<T>& call, Product<T>* products, int terms, T* dx) {
  const OpPlan<T>& plan = call.plan;
  if (plan.narrow) return narrow::products_back(call, products, terms, dx);
  for (int term = 0; term < terms; ++term) {
    const bool kept = term == 0 && plan.keeps_transposed;  // the first is of theta
    T* target = kept ? call.saved : call.scratch + term * plan.transposed.size();
    if (!kept || !call.dy_t)  // in a tangent they are there
      transpose<T>(plan.matrix, products[term].b, plan.transposed, target, plan.op.kernel.y * plan.op.kernel.x,
                   plan.in[0].shape.channels, plan.out.shape.channels);
    products[term].b = target;
  }
  if (!plan.winograd)
    return gather<T>(plan.input_gradient, plan.transposed, products, terms, nullptr, dx, call.accumulate[0]);
  T* scratch = call.scratch + 2 * plan.transposed.size();
  for (int term = 0; term < terms; ++term, scratch += plan.input_gradient_tiles.weights()) {
    plan.input_gradient_tiles.transform_weights(plan.transposed, products[term].b, true, scratch);
    products[term].b = scratch;
  }
  plan.input_gradient_tiles.convolve(products, terms, nullptr, dx, call.accumulate[0], scratch);
}

// dw += products of inputs and output adjoints.
template <class T>
void weight_gradient(const OpCall<T>& call, const Product<T>* products, int terms, T* dw) {
  const OpPlan<T>& plan = call.plan;
  if (plan.narrow) return narrow::weight_gradient(plan, products, terms, dw);
  if (!plan.winograd) return outer<T>(plan.weight_gradient, plan.matrix, products, terms, dw);
  T* scratch = call.scratch + plan.forward_tiles.weights();
  plan.forward_tiles.weight_gradient(products, terms, plan.matrix, dw, call.scratch, scratch);
}

template <class T>
void forward(const OpCall<T>& call) {
  Product<T> product{call.x[0], call.p[0]};
  convolve(call, &product, 1, call.p[1], call.y);
}

template <class T>
void backward(const OpCall<T>& call) {
  const OpPlan<T>& plan = call.plan;
  if (call.dx[0]) {
    Product<T> product{call.dy, call.p[0]};
    convolve_back(call, &product, 1, call.dx[0]);
  }
  if (call.dp[0]) {
    const Product<T> product{call.x[0], call.dy};
    weight_gradient(call, &product, 1, call.dp[0]);
  }
  if (call.dp[1]) add_column_sums(call.dy, plan.rows(), plan.out.stride, call.dp[1]);
}

// Whether the weight gradient may be summed picture by picture, by take_picture.
template <class T>
bool takes_pictures(const OpPlan<T>& plan) {
  return !plan.winograd && !plan.narrow && plan.weight_gradient.images == plan.images;
}

// The parameters' share of one picture, whose output adjoint is all that lies in dy.
template <class T>
void take_picture(const OpCall<T>& call, int image) {
  const OpPlan<T>& plan = call.plan;
  const Product<T> product{call.x[0] + image * plan.in[0].sample(), call.dy};
  if (call.dp[0]) outer_images<T>(plan.weight_gradient, 1, plan.matrix, &product, 1, call.dp[0]);
  if (call.dp[1]) add_column_sums(call.dy, plan.out.shape.pixels(), plan.out.stride, call.dp[1]);
}

template <class T>
void tangent(const OpCall<T>& call) {
  Product<T> products[2];
  int terms = 0;
  if (call.x_t[0]) products[terms++] = {call.x_t[0], call.p[0]};
  if (call.p_t[0]) products[terms++] = {call.x[0], call.p_t[0]};
  convolve(call, products, terms, call.p_t[1], call.y_t);
}

template <class T>
void tangent_backward(const OpCall<T>& call) {
  const OpPlan<T>& plan = call.plan;
  if (call.dx_t[0]) {
    Product<T> products[2] = {{call.dy_t, call.p[0]}, {call.dy, call.p_t[0]}};
    convolve_back(call, products, call.p_t[0] ? 2 : 1, call.dx_t[0]);
  }
  if (call.dp_t[0]) {
    const Product<T> products[2] = {{call.x[0], call.dy_t}, {call.x_t[0], call.dy}};
    weight_gradient(call, products, call.x_t[0] ? 2 : 1, call.dp_t[0]);
  }
  if (call.dp_t[1]) add_column_sums(call.dy_t, plan.rows(), plan.out.stride, call.dp_t[1]);
}

}  // namespace conv2d
}  // namespace metaaug::METAAUG_ISA
