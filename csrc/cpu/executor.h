// The inner loop and its reverse, task by task.
//
//   theta_{k+1} = theta_k - alpha_k m_{k+1},  m_{k+1} = mu m_k + g_k + lambda theta_k
//   reverse, from v = dL/dtheta_K and n = 0:  u = alpha_k v + n;  dL/dalpha_k -= v m_{k+1};
//   v -= (H_k + lambda) u;  n = mu u
//
// One worker takes one task at a time and keeps all of it in its own arena. Tasks are summed in groups whose borders
// and order do not depend on the number of workers, so the result does not either.
#pragma once

#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#include "../fuse.h"
#include "encoder.h"

namespace metaaug::METAAUG_ISA {

using cpu::Parallel;

template <class T>
class Executor final : public cpu::Engine<T> {
  using S = Simd<T>;
  using Vector = typename S::Vector;

 public:
  explicit Executor(const Graph& graph)
      : graph_(fuse(graph, false)),
        packing_(graph.parameters),
        kept_bytes_(kept_bytes()),
        encoder_(graph_, packing_, kept_bytes_) {}

  NonFinite run(const Call<T>& call, const Parallel& parallel) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Plan plan = prepare(call, parallel.workers);
    const int64_t group_size =
        (call.grad_parameters || call.mean_displacement ? packing_.size() : 0) + (call.grad_rates ? rates_size_ : 0);
    const int groups = std::min(call.tasks, kGroups);
    sums_.assign(group_size, T(0));
    failures_.assign(groups, NonFinite());
    if (int(arenas_.size()) < parallel.workers) arenas_.resize(parallel.workers);
    Turns turns;
    parallel.run(groups, [&](int group, int worker) {
      Turns::Turn turn(turns, group);
      Worker w(*this, call, plan, parallel, arenas_[worker], group_size, failures_[group]);
      const int64_t first = int64_t{group} * call.tasks / groups, last = int64_t{group + 1} * call.tasks / groups;
      for (int64_t task = first; task < last && failures_[group].task < 0 && !parallel.stopped(); ++task)
        w.run(int(task));
      turn.wait();
      for (int64_t i = 0; i < group_size; ++i) sums_[i] += w.sums[i];
    });
    for (const NonFinite& failure : failures_)
      if (failure.task >= 0) return failure;
    if (call.mean_displacement) {
      for (int64_t i = 0; i < packing_.size(); ++i) sums_[i] /= T(call.tasks);
      packing_.unpack_all(sums_.data(), call.mean_displacement);
    }
    if (call.grad_parameters) packing_.unpack_all(sums_.data(), call.grad_parameters);
    if (call.grad_rates) unpack_rates(call, sums_.data() + group_size - rates_size_, call.grad_rates);
    return NonFinite();
  }

  bool encode(const Encoding<T>& call, const Parallel& parallel) override { return encoder_.run(call, parallel); }

 private:
  static constexpr int kPlannedSizes = 32;
  static constexpr int kGroups = 64;  // enough to keep many cores busy

  // What a call needs, in sizes: networks for its batch sizes, and the arena of a worker.
  struct Plan {
    const Network<T>*support = nullptr, *query = nullptr;
    bool keep_path = false;        // theta_0..theta_K, for the reverse sweep
    bool keep_directions = false;  // m_1..m_K, for the gradient of the rates
    bool remembers = false;        // m_k at least, for momentum or the former
    int slots = 0;                 // steps whose activations are kept; others are computed again, to the same bits
  };

  struct RateView {
    int64_t offset = -1, row = 0;  // in rates_; row: distance from step to step
    bool per_element = false;
    T at(const T* rates, int step) const { return rates[offset + step * row]; }
  };

  struct Worker;

  const Network<T>& network(int images, const std::vector<char>& adapted, const std::vector<char>& wanted,
                            bool wants_input, bool repeats) {
    auto& entry = networks_[std::make_tuple(images, adapted, wanted, wants_input, repeats)];
    if (!entry) entry = std::make_unique<Network<T>>(graph_, images, adapted, wanted, wants_input, repeats);
    return *entry;
  }

  Plan prepare(const Call<T>& call, int workers) {
    const int count = packing_.count(), steps = call.settings.steps;
    if (networks_.size() > kPlannedSizes) networks_.clear();
    std::vector<char> adapted(count), wanted(call.wanted);
    for (int p = 0; p < count; ++p) {
      adapted[p] = call.rates[p].data != nullptr;
      wanted[p] |= adapted[p] || call.grad_initial != nullptr;
    }
    Plan plan;
    if (steps > 0) {
      const int images = call.support.rows ? call.support.batch : call.support.count;
      plan.support = &network(images, adapted, wanted, call.grad_support_x != nullptr, !call.support.rows);
    }
    if (call.query.x) plan.query = &network(call.query.count, adapted, wanted, call.grad_query_x != nullptr, false);
    plan.keep_path = call.reverse() && steps > 0 && (!call.settings.first_order || call.step_weights);
    plan.keep_directions = call.grad_rates != nullptr;
    plan.remembers = plan.keep_directions || call.settings.momentum != 0;
    if (plan.support) {
      const Network<T>& net = *plan.support;
      const int64_t bytes = (net.values_size + net.adjoints_size + net.saved_size) * int64_t(sizeof(T));
      const bool second_order = call.reverse() && !call.settings.first_order;
      plan.slots =
          second_order ? int(std::clamp<int64_t>(kept_bytes_ / workers / std::max<int64_t>(bytes, 1), 1, steps)) : 1;
    }
    pack_shared(call);
    return plan;
  }

  // theta_0, rates and frozen statistics in the engine's layout, once for all tasks.
  void pack_shared(const Call<T>& call) {
    if (!call.initial) theta_ = packing_.packed(call.parameters);
    rate_views_.assign(packing_.count(), RateView());
    rates_size_ = 0;
    for (int p = 0; p < packing_.count(); ++p) {
      if (!call.rates[p].data) continue;
      const int64_t size = call.rates[p].per_element ? packing_.size(p) : 1;
      rate_views_[p] = {rates_size_, call.rates[p].per_step ? size : 0, call.rates[p].per_element};
      rates_size_ += size * (call.rates[p].per_step ? call.settings.steps : 1);
    }
    rates_.assign(rates_size_, T(0));
    each_rate(call, [&](int p, bool per_element, int64_t at, int64_t flat) {
      if (per_element)
        packing_.pack(p, call.rates[p].data + flat, rates_.data() + at);
      else
        rates_[at] = call.rates[p].data[flat];
    });
    constants_ = pack_constants(graph_, call.buffers);
  }

  // body(parameter, per_element, offset in rates_, offset in the parameter's own rate tensor) for each step's rate.
  template <class Body>
  void each_rate(const Call<T>& call, const Body& body) const {
    for (int p = 0; p < packing_.count(); ++p) {
      if (!call.rates[p].data) continue;
      const RateView& view = rate_views_[p];
      const int64_t flat = view.per_element ? packing_.flat_size(p) : 1;
      for (int k = 0; k < (call.rates[p].per_step ? call.settings.steps : 1); ++k)
        body(p, view.per_element, view.offset + k * view.row, k * flat);
    }
  }

  void unpack_rates(const Call<T>& call, const T* packed, T* flat) const {
    int64_t start = 0;
    each_rate(call, [&](int p, bool per_element, int64_t at, int64_t) {
      if (per_element)
        packing_.unpack(p, packed + at, flat + start);
      else
        flat[start] = packed[at];
      start += per_element ? packing_.flat_size(p) : 1;
    });
  }

  Graph graph_;
  Packing<T> packing_;
  const int64_t kept_bytes_;
  std::map<std::tuple<int, std::vector<char>, std::vector<char>, bool, bool>, std::unique_ptr<Network<T>>> networks_;
  std::vector<T> theta_, rates_, constants_, sums_;
  std::vector<RateView> rate_views_;
  int64_t rates_size_ = 0;
  std::vector<Arena<T>> arenas_;
  std::vector<NonFinite> failures_;
  std::mutex mutex_;
  Encoder<T> encoder_;
};

}  // namespace metaaug::METAAUG_ISA

#include "task.h"
