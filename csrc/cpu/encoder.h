// Many samples through one set of weights, forward and back, where there is no inner loop.
//
// Samples go in pieces that stay in a core's cache. Batch norms see all samples together: they divide the ops into
// stages, which all pieces end before any begins the next. What pieces have found for a norm, and their gradients, are
// put together in the pieces' order, so that no result depends on the number of workers.
#pragma once

#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include "arena.h"
#include "engine.h"
#include "input.h"
#include "passes.h"
#include "turns.h"

namespace metaaug::METAAUG_ISA {

using cpu::Parallel;

template <class T>
class Encoder {
  using S = Simd<T>;
  using Range = typename Passes<T>::Range;

 public:
  // The graph and the packing must outlive it.
  Encoder(const Graph& graph, const Packing<T>& packing, int64_t kept_bytes)
      : graph_(graph), packing_(packing), kept_bytes_(kept_bytes), piece_size_(find_piece_size(graph)) {
    for (size_t i = 0; i < graph.ops.size(); ++i)
      if (graph.ops[i].kind == OpKind::kBatchNorm && graph.ops[i].buffer[0] < 0) norms_.push_back(i);
  }

  bool run(const Encoding<T>& call, const Parallel& parallel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool back = call.adjoint, known = back && call.number && call.number == kept_;
    kept_ = 0;
    if (!known) {
      theta_ = packing_.packed(call.parameters);
      constants_ = pack_constants(graph_, call.buffers);
      lay_out(call, back);
    }
    prepare_workers(back, parallel.workers);
    if (!known && (!back || !norms_.empty()) && !forward(call, parallel)) return false;
    if (back) return backward(call, parallel, known);
    kept_ = call.number;
    return true;
  }

 private:
  static constexpr int kPlannedSizes = 32;
  static constexpr int64_t kPieceBytes = int64_t{1} << 20;  // of the largest value: about a core's own cache
  static constexpr int kLargestPiece = 32;

  struct Piece {
    int first = 0;  // sample
    const Network<T>* net = nullptr;
    T* memory = nullptr;  // null: the worker's
  };
  struct Worker {
    Arena<T> arena;
    T *scratch = nullptr, *gradient = nullptr, *memory = nullptr;
  };

  // At least two samples, for a norm over one pixel.
  static int find_piece_size(const Graph& graph) {
    int64_t largest = 1;
    for (const Shape& shape : graph.values) largest = std::max(largest, shape.pixels() * pad<T>(shape.channels));
    return int(std::clamp<int64_t>(kPieceBytes / (largest * int64_t(sizeof(T))), 2, kLargestPiece));
  }

  const Network<T>& network(int images, const Encoding<T>& call) {
    auto& entry = networks_[std::make_tuple(images, call.wanted, call.wants_x)];
    if (!entry) {
      const std::vector<char> adapted(packing_.count(), 0);
      entry = std::make_unique<Network<T>>(graph_, images, adapted, call.wanted, call.wants_x, false);
    }
    return *entry;
  }

  // Of a frame, in elements; `reverse`: with room for adjoints.
  static int64_t size_of(const Network<T>& net, bool reverse) {
    return Arena<T>::round(net.input_size) + Arena<T>::round(net.values_size) + Arena<T>::round(net.saved_size) +
           (reverse ? Arena<T>::round(net.passing_size) : 0);
  }
  static Frame<T> frame_at(T* memory, const Network<T>& net) {
    Frame<T> frame;
    frame.passing = true;
    frame.input = memory;
    frame.values = frame.input + Arena<T>::round(net.input_size);
    frame.saved = frame.values + Arena<T>::round(net.values_size);
    frame.adjoints = frame.saved + Arena<T>::round(net.saved_size);
    return frame;
  }

  // Pieces that differ by a sample at most. They keep their activations where norms need all of them at once, or, as
  // far as the budget goes, for the way back.
  void lay_out(const Encoding<T>& call, bool back) {
    if (networks_.size() > kPlannedSizes) networks_.clear();
    pieces_.assign(std::max(1, call.samples / piece_size_), Piece());
    const int count = int(pieces_.size());
    const bool reverse = back || call.number;
    largest_ = scratch_size_ = 0;
    for (int i = 0; i < count; ++i) {
      const int first = int(int64_t{i} * call.samples / count), last = int((int64_t{i} + 1) * call.samples / count);
      pieces_[i].first = first;
      pieces_[i].net = &network(last - first, call);
      largest_ = std::max(largest_, size_of(*pieces_[i].net, reverse));
      scratch_size_ = std::max(scratch_size_, pieces_[i].net->scratch_size);
    }
    int64_t keepers = call.number && !back ? kept_bytes_ / (largest_ * int64_t(sizeof(T))) : 0;
    if (!norms_.empty()) keepers = count;
    keepers_ = int(std::min<int64_t>(keepers, count));
    int64_t total = 0;
    for (int i = 0; i < keepers_; ++i) total += size_of(*pieces_[i].net, reverse);
    arena_.reserve(total);
    for (int i = 0; i < keepers_; ++i) pieces_[i].memory = arena_.take(size_of(*pieces_[i].net, reverse));
    norm_size_ = 0;
    for (size_t norm : norms_)
      norm_size_ = std::max(norm_size_, pad<T>(graph_.values[graph_.ops[norm].output].channels));
    parts_.resize(2 * norm_size_ * count);
  }

  void prepare_workers(bool back, int workers) {
    workers_.resize(std::max<size_t>(workers_.size(), workers));
    const int64_t memory = keepers_ < int(pieces_.size()) ? largest_ : 0, gradient = back ? packing_.size() : 0;
    for (int i = 0; i < workers; ++i) {
      Worker& w = workers_[i];
      w.arena.reserve(Arena<T>::round(scratch_size_) + Arena<T>::round(gradient) + Arena<T>::round(memory));
      w.scratch = w.arena.take(scratch_size_);
      w.gradient = w.arena.take(gradient);
      w.memory = w.arena.take(memory);
    }
  }

  // Stage s ends before norm s, and begins with the second half of the one before.
  size_t stages() const { return norms_.size() + 1; }
  Range ops_of(size_t stage) const {
    return {stage > 0 ? norms_[stage - 1] + 1 : 0, stage < norms_.size() ? norms_[stage] : graph_.ops.size()};
  }
  int64_t outputs() const { return graph_.values[graph_.output].size(); }
  const Op& norm(size_t stage) const { return graph_.ops[norms_[stage]]; }
  T* part(int piece) { return parts_.data() + 2 * norm_size_ * piece; }

  // One piece in one worker's hands.
  struct Hand {
    const Piece& piece;
    const Network<T>& net;
    const Frame<T> frame;
    const Passes<T> passes;
  };
  Hand hand(int index, int worker) const {
    const Piece& piece = pieces_[index];
    T* memory = piece.memory ? piece.memory : workers_[worker].memory;
    return {piece,
            *piece.net,
            frame_at(memory, *piece.net),
            {*piece.net, packing_, constants_.data(), workers_[worker].scratch}};
  }

  bool forward(const Encoding<T>& call, const Parallel& parallel) {
    for (size_t s = 0; s < stages(); ++s) {
      if (parallel.stopped()) return false;
      parallel.run(int(pieces_.size()), [&](int index, int worker) {
        if (!parallel.stopped()) advance(call, s, index, hand(index, worker));
      });
      if (s < norms_.size()) settle(s);
    }
    if (call.statistics) write_statistics(call);
    return !parallel.stopped();
  }

  void advance(const Encoding<T>& call, size_t s, int index, const Hand& h) {
    const T* theta = theta_.data();
    if (s == 0) load_input(h.net, call.x + h.piece.first * graph_.values[0].size(), nullptr, h.frame.input);
    if (s > 0) norm_functions<T>(norm(s - 1)).normalise(h.passes.forward_call(norms_[s - 1], h.frame, theta));
    h.passes.forward(h.frame, theta, ops_of(s));
    if (s < norms_.size()) {
      const OpCall<T> call_of_norm = h.passes.forward_call(norms_[s], h.frame, theta);
      norm_functions<T>(norm(s)).moments(call_of_norm, part(index), part(index) + call_of_norm.plan.out.stride);
    } else if (call.output) {
      unload_output(h.net, h.net.value(h.frame, graph_.output), call.output + h.piece.first * outputs());
    }
  }

  // Mean and variance of all pieces, for each of them.
  void settle(size_t s) {
    const OpPlan<T>& plan = pieces_[0].net->ops[norms_[s]];
    const int64_t stride = plan.out.stride;
    std::vector<T> whole(3 * stride, T(0));
    int64_t rows = 0;
    for (size_t i = 0; i < pieces_.size(); ++i) {
      const int64_t more = pieces_[i].net->ops[norms_[s]].in_rows();
      const T* found = part(int(i));
      for (int64_t c = 0; c < stride; c += S::kWidth)
        join_moments<T>(rows, more, S::load(found + c), S::load(found + stride + c), whole.data() + c,
                        whole.data() + 2 * stride + c);
      rows += more;
    }
    norm_functions<T>(norm(s)).settle(plan, rows, whole.data());
    for (const Piece& piece : pieces_)
      std::copy(whole.begin(), whole.end(), piece.net->saved(frame_at(piece.memory, *piece.net), norms_[s]));
  }

  void write_statistics(const Encoding<T>& call) {
    const Network<T>& net = *pieces_[0].net;
    const auto saved = [&](size_t i) -> const T* {
      if (graph_.ops[i].buffer[0] >= 0) return constants_.data() + net.constants_at[i];
      return net.saved(frame_at(pieces_[0].memory, net), i);
    };
    unload_statistics(net, call.samples, saved, call.statistics);
  }

  bool backward(const Encoding<T>& call, const Parallel& parallel, bool known) {
    gradient_.assign(packing_.size(), T(0));
    for (size_t s = stages(); s-- > 0;) {
      if (parallel.stopped()) return false;
      Turns turns;
      parallel.run(int(pieces_.size()), [&](int index, int worker) {
        Turns::Turn turn(turns, index);
        if (parallel.stopped()) return;
        const Hand h = hand(index, worker);
        if (norms_.empty() && (!known || !h.piece.memory)) advance(call, 0, index, h);
        T* mine = workers_[worker].gradient;
        each_wanted(call, s, [&](int64_t at, int64_t size) { std::fill(mine + at, mine + at + size, T(0)); });
        retreat(call, s, index, h, mine);
        turn.wait();
        each_wanted(call, s, [&](int64_t at, int64_t size) {
          for (int64_t i = at; i < at + size; ++i) gradient_[i] += mine[i];
        });
      });
      if (s > 0) sum_adjoints(s - 1);
    }
    if (call.grad_parameters) packing_.unpack_all(gradient_.data(), call.grad_parameters);
    return !parallel.stopped();
  }

  void retreat(const Encoding<T>& call, size_t s, int index, const Hand& h, T* gradient) {
    const T* theta = theta_.data();
    if (s == norms_.size()) {
      load_output_adjoint(h.net, call.adjoint + h.piece.first * outputs(), h.net.adjoint(h.frame, graph_.output));
    } else {
      const OpPlan<T>& plan = h.net.ops[norms_[s]];
      h.passes.spread(norms_[s], h.frame, theta, gradient, sums_.data(),
                      T(1) / T(int64_t{call.samples} * plan.in[0].shape.pixels()));
    }
    h.passes.backward(h.frame, theta, {}, h.net.outer, gradient, ops_of(s));
    if (s > 0 && h.net.outer[norms_[s - 1]].active) {
      const OpCall<T> of_norm = h.passes.backward_call(norms_[s - 1], h.frame, theta);
      const T* found = norm_functions<T>(norm(s - 1)).adjoint_sums(of_norm);
      std::copy(found, found + 2 * of_norm.plan.out.stride, part(index));
    }
    if (s == 0 && call.grad_x)
      add_input_adjoint(h.net, h.net.adjoint(h.frame, 0), nullptr,
                        call.grad_x + h.piece.first * graph_.values[0].size());
  }

  // Of dz and dz xh over all pieces; they are the gradients of the norm's own weights, too.
  void sum_adjoints(size_t s) {
    const Network<T>& net = *pieces_[0].net;
    if (!net.outer[norms_[s]].active) return;
    const int64_t stride = net.ops[norms_[s]].out.stride;
    sums_.assign(2 * stride, T(0));
    for (size_t i = 0; i < pieces_.size(); ++i)
      for (int64_t c = 0; c < 2 * stride; ++c) sums_[c] += part(int(i))[c];
    for (int p = 0; p < 2; ++p)
      if (net.outer[norms_[s]].dp[p])
        for (int64_t c = 0; c < stride; ++c)
          gradient_[packing_.offset(norm(s).param[p]) + c] += sums_[(1 - p) * stride + c];
  }

  // body(offset, size) of the parameters that a stage adds a gradient to, each once.
  template <class Body>
  void each_wanted(const Encoding<T>& call, size_t stage, const Body& body) const {
    const Range ops = ops_of(stage);
    std::vector<char> wanted(call.wanted);
    for (size_t i = ops.first; i < ops.last; ++i)
      for (int p : graph_.ops[i].param)
        if (p >= 0 && wanted[p]) wanted[p] = 0, body(packing_.offset(p), packing_.size(p));
  }

  const Graph& graph_;
  const Packing<T>& packing_;
  const int64_t kept_bytes_;
  const int piece_size_;
  std::vector<size_t> norms_;  // batch norms over all samples, in order of ops
  std::map<std::tuple<int, std::vector<char>, bool>, std::unique_ptr<Network<T>>> networks_;
  std::vector<T> theta_, constants_, gradient_, parts_, sums_;
  std::vector<Piece> pieces_;
  std::vector<Worker> workers_;
  Arena<T> arena_;
  int keepers_ = 0;
  int64_t largest_ = 0, scratch_size_ = 0, norm_size_ = 0;
  uint64_t kept_ = 0;  // the pass whose activations lie in the arena
  std::mutex mutex_;
};

}  // namespace metaaug::METAAUG_ISA
