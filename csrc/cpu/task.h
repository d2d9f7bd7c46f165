// One task of a call: K steps forward, the query, K steps back.
#pragma once

#include "executor.h"

namespace metaaug::METAAUG_ISA {

template <class T>
struct Executor<T>::Worker {
  using Pass = typename Passes<T>::Pass;

  const Executor& engine;
  const Call<T>& call;
  const Plan& plan;
  const Parallel& parallel;
  NonFinite& failure;
  const Packing<T>& packing = engine.packing_;
  const int steps = call.settings.steps;
  const int64_t size = packing.size();
  int task = 0;

  // Sums over this group's tasks, of gradients or displacements and of rates' gradients.
  T *sums, *sum = nullptr, *rate_sum = nullptr;

  // Of size P: a start of the task's own; weights after every step, or one set that is overwritten; directions
  // likewise. The adjoint takes the gradient's place after the last step, the tangent that of theta_K after the query.
  T *start = nullptr, *path = nullptr, *directions = nullptr, *gradient, *second = nullptr, *adjoint = nullptr,
    *tangent = nullptr, *carry = nullptr;
  // Activations: a slot for each kept step; tangents and the query pass share theirs, being never alive together.
  std::vector<Frame<T>> slots;
  Frame<T> tangents, query;
  T* scratch;

  Worker(const Executor& engine, const Call<T>& call, const Plan& plan, const Parallel& parallel, Arena<T>& arena,
         int64_t sums_size, NonFinite& failure)
      : engine(engine), call(call), plan(plan), parallel(parallel), failure(failure) {
    lay_out(arena, sums_size, true);  // the same walk twice: sizes, then addresses
    lay_out(arena, sums_size, false);
    std::fill(sums, sums + sums_size, T(0));
    if (call.grad_parameters || call.mean_displacement) sum = sums;
    if (call.grad_rates) rate_sum = sums + (sum ? size : 0);
  }

  // Where the call is stopped between two steps, what it has made so far is of no use to anybody.
  void run(int index) {
    task = index;
    load_start();
    for (int k = 0; k < steps && failure.task < 0; ++k) {
      if (parallel.stopped()) return;
      if (call.by_step() || (!call.reverse() && call.step_weights && k > 0)) judge(k, nullptr);
      step(k);
    }
    if (failure.task >= 0) return;
    const T* last = theta(steps);
    if (call.flat) packing.unpack_all(last, call.flat + task * packing.flat_size());
    if (call.mean_displacement)
      for (int64_t i = 0; i < size; ++i) sum[i] += last[i] - engine.theta_[i];
    if (adjoint) std::fill(adjoint, adjoint + size, T(0));
    if (plan.query) judge(steps, adjoint);
    if (!call.reverse() || failure.task >= 0) return;
    if (call.flat_adjoint) packing.pack_all(call.flat_adjoint + task * packing.flat_size(), adjoint);
    if (carry) std::fill(carry, carry + size, T(0));
    if (tangents.carried) std::fill(tangents.carried, tangents.carried + plan.support->carried_size, T(0));
    for (int k = steps - 1; k >= 0; --k) {
      if (parallel.stopped()) return;
      step_back(k);
      if (call.step_weights && k > 0) judge(k, adjoint);
    }
    if (tangents.carried) passes(*plan.support).still_backward(slot(0), tangents, theta(0), adjoint);
    finish();
  }

 private:
  // A group of one task whose gradient is the sum itself.
  bool alone() const {
    return call.tasks <= kGroups && call.grad_parameters && !call.grad_rates && !call.mean_displacement;
  }
  const T* theta(int k) const {
    if (k > 0) return plan.keep_path ? path + (k - 1) * size : path;
    return start ? start : engine.theta_.data();
  }
  T* direction(int k) const { return plan.keep_directions ? directions + k * size : directions; }
  const Frame<T>& slot(int k) const { return slots[k % slots.size()]; }
  bool kept(int k) const { return k >= steps - int(slots.size()); }
  Pass pass(int index, int row) const { return {row, call.settings.seed, uint32_t(task), uint32_t(index)}; }
  Passes<T> passes(const Network<T>& net) const { return {net, packing, engine.constants_.data(), scratch}; }

  void lay_out(Arena<T>& arena, int64_t sums_size, bool measuring) {
    int64_t total = 0;
    const auto take = [&](int64_t count) -> T* {
      total += Arena<T>::round(count);
      return measuring ? nullptr : arena.take(count);
    };
    const bool reverse = call.reverse(), momentum = call.settings.momentum != 0;
    gradient = take(size);
    if (reverse) adjoint = gradient;
    sums = alone() ? adjoint : take(sums_size);
    if (call.initial) start = take(size);
    path = take((plan.keep_path ? steps : std::min(steps, 1)) * size);
    if (plan.remembers || call.settings.optimizer == OptimizerKind::kAdam)
      directions = take((plan.keep_directions ? steps : 1) * size);
    if (call.settings.optimizer == OptimizerKind::kAdam) second = take(size);
    if (steps > 0) tangent = path + (plan.keep_path ? steps - 1 : 0) * size;
    if (reverse && momentum) carry = take(size);
    const bool second_order = reverse && !call.settings.first_order;
    const auto frame = [&](const Network<T>& net, bool adjoints, bool passing) {
      Frame<T> f;
      f.passing = passing;
      f.values = take(net.values_size);
      if (adjoints) f.adjoints = take(passing ? net.passing_size : net.adjoints_size);
      f.saved = take(net.saved_size + saved_by_loss(net));
      return f;
    };
    slots.clear();
    T *input = nullptr, *still = nullptr, *carried = nullptr, *unread = nullptr;
    if (plan.support) {
      input = take(plan.support->input_size);
      still = take(plan.support->still_size);
      if (second_order) carried = take(plan.support->carried_size);
      if (second_order) unread = take(plan.support->unread_size);
    }
    for (int i = 0; i < plan.slots && plan.support; ++i) {
      slots.push_back(frame(*plan.support, true, !second_order));
      slots[i].input = call.support.rows && i > 0 ? take(plan.support->input_size) : input;
      slots[i].still = still;
      slots[i].unread = unread;
    }
    const int64_t shared = total, used = arena.used();
    if (plan.support && second_order) {
      tangents.passing = true;
      tangents.values = take(plan.support->values_size);
      tangents.adjoints = take(plan.support->passing_size);
      tangents.saved = take(plan.support->saved_tangent_size);
      tangents.carried = carried;
    }
    const int64_t tangents_end = total;
    total = shared;
    if (!measuring) arena.rewind(used);
    if (plan.query) {
      query = frame(*plan.query, reverse, true);
      query.input = take(plan.query->input_size);
    }
    total = std::max(total, tangents_end);
    if (!measuring) arena.rewind(used + total - shared);
    int64_t scratch_size = 0;
    for (const Network<T>* net : {plan.support, plan.query})
      if (net) scratch_size = std::max(scratch_size, net->scratch_size);
    scratch = take(scratch_size);
    if (measuring) arena.reserve(total);
  }

  void load_start() {
    if (start) {
      std::fill(start, start + size, T(0));
      packing.pack_all(call.initial + task * packing.flat_size(), start);
    }
    if (!plan.support) return;
    if (!call.support.rows) load_input(*plan.support, of_task(call.support, call.support.x), nullptr, slots[0].input);
    if (second) std::fill(directions, directions + size, T(0));
    if (second) std::fill(second, second + size, T(0));
  }

  // This task's part of inputs, or of their adjoints.
  template <class Value>
  Value* of_task(const Samples<T>& samples, Value* all) const {
    return all + int64_t{task} * samples.count * graph().values[0].size();
  }

  const int64_t* support_rows(int k) const {
    const auto& s = call.support;
    return s.rows ? s.rows + (int64_t{task} * steps + k) * s.batch : nullptr;
  }

  Targets<T> targets(const Samples<T>& s, const int64_t* rows) const {
    const int64_t first = int64_t{task} * s.count;
    return {s.ids ? s.ids + first : nullptr,
            s.values ? s.values + first * graph().values[graph().output].size() : nullptr,
            s.weight ? s.weight + first : nullptr, rows};
  }

  const Graph& graph() const { return engine.graph_; }

  LossPlan<T> loss(const Network<T>& net) const {
    LossPlan<T> result = net.loss;
    result.kind = call.settings.loss;
    result.smoothing = T(call.settings.label_smoothing);
    return result;
  }

  int64_t saved_by_loss(const Network<T>& net) const {
    return call.settings.loss == LossKind::kCrossEntropy ? int64_t{net.images} * net.loss.classes : 0;
  }

  T* probabilities(const Network<T>& net, const Frame<T>& frame) const { return frame.saved + net.saved_size; }

  bool finite(T value, int step, bool query, const char* what) {
    if (std::isfinite(value)) return true;
    if (failure.task < 0) failure = {task, step, query, what, double(value)};
    return false;
  }

  // `poison` is that of every value.
  bool finite(typename S::Bits poison, const T* values, int step, const char* what) {
    bool found = false;
    for (int i = 0; i < S::kWidth; ++i) found |= poison[i] != 0;
    if (!found) return true;
    const T* bad = std::find_if(values, values + size, [](T value) { return !std::isfinite(value); });
    return finite(*bad, step, false, what);
  }

  // Activations and adjoints of step k at theta_k; without `grad`, once more.
  T evaluate(int k, T* grad) {
    const Network<T>& net = *plan.support;
    const Frame<T>& frame = slot(k);
    const Passes<T> run = passes(net);
    const int64_t* rows = support_rows(k);
    if (rows) load_input(net, of_task(call.support, call.support.x), rows, frame.input);
    run.forward(frame, theta(k), pass(2 * k, k), k > 0 || !grad);
    const int out = graph().output;
    const T value = loss_forward(loss(net), targets(call.support, rows), net.value(frame, out), T(1),
                                 probabilities(net, frame), net.adjoint(frame, out), static_cast<T*>(nullptr));
    if (net.moves[out]) run.backward(frame, theta(k), pass(2 * k, k), net.inner, grad);
    return value;
  }

  void step(int k) {
    std::fill(gradient, gradient + size, T(0));
    if (!finite(evaluate(k, gradient), k, false, "loss")) return;
    const Settings& s = call.settings;
    const T *from = theta(k), *g = gradient;
    T* to = path + (plan.keep_path ? k * size : 0);
    const T momentum = k > 0 ? T(s.momentum) : T(0), decay = T(s.weight_decay);
    typename S::Bits poison{};
    for (int p = 0; p < packing.count(); ++p) {
      const RateView& rate = engine.rate_views_[p];
      const int64_t first = packing.offset(p), last = first + packing.size(p);
      if (rate.offset < 0) {
        if (to != from) std::copy(from + first, from + last, to + first);
        continue;
      }
      const auto descend = [&](const auto& direction_at) {
        with_rate(rate, k, first, [&, first, last, from, to](const auto& rate_at) {
          typename S::Bits poison_here{};
          for (int64_t i = first; i < last; i += S::kWidth) {
            const Vector here = S::load(from + i), next = here - rate_at(i) * direction_at(i, here);
            poison_here |= S::poison(next);
            S::store(to + i, next);
          }
          poison |= poison_here;
        });
      };
      if (second) {
        const Adam adam(s, k);
        descend(
            [&](int64_t i, Vector here) { return adam(S::load(g + i) + decay * here, directions + i, second + i); });
      } else if (plan.remembers) {
        const T* m_from = direction(k > 0 ? k - 1 : 0);
        T* m_to = direction(k);
        descend([=](int64_t i, Vector here) {
          Vector m = S::load(g + i) + decay * here;
          if (momentum != T(0)) m += momentum * S::load(m_from + i);
          S::store(m_to + i, m);
          return m;
        });
      } else {
        descend([=](int64_t i, Vector here) { return S::load(g + i) + decay * here; });
      }
    }
    finite(poison, to, k, "an adapted weight");
  }

  // Calls body(rate of the vector at i) for step k. Bodies loop over locals: a vector's store may change a member.
  template <class Body>
  void with_rate(const RateView& rate, int k, int64_t first, const Body& body) const {
    const T* alpha = engine.rates_.data() + rate.offset + k * rate.row;
    if (rate.per_element) return body([=](int64_t i) { return S::load(alpha + i - first); });
    body([shared = S::fill(*alpha)](int64_t) { return shared; });
  }

  // Bias-corrected ratio of moments (Kingma and Ba 2015).
  struct Adam {
    T beta1, beta2, eps, correction1, correction2;
    Adam(const Settings& s, int k)
        : beta1(T(s.beta1)),
          beta2(T(s.beta2)),
          eps(T(s.eps)),
          correction1(T(1 / (1 - std::pow(s.beta1, k + 1)))),
          correction2(T(1 / (1 - std::pow(s.beta2, k + 1)))) {}
    Vector operator()(Vector g, T* first, T* second) const {
      const Vector m = beta1 * S::load(first) + (T(1) - beta1) * g;
      const Vector v = beta2 * S::load(second) + (T(1) - beta2) * g * g;
      S::store(first, m);
      S::store(second, v);
      Vector ratio{};
      for (int i = 0; i < S::kWidth; ++i) ratio[i] = m[i] * correction1 / (std::sqrt(v[i] * correction2) + eps);
      return ratio;
    }
  };

  // The query pass after k steps. With `grad`, adds its share of dL/dtheta_k there.
  void judge(int k, T* grad) {
    const bool is_last = k == steps;
    const T weight = call.step_weights && k > 0 ? call.step_weights[k - 1] : T(is_last);
    if (weight == T(0) && !is_last && !call.step_losses && !call.by_step()) return;
    const Network<T>& net = *plan.query;
    const Passes<T> run = passes(net);
    const int behind = call.settings.first_step + k;
    const Pass query_pass = pass(2 * behind + 1, std::max(behind - 1, 0));
    load_input(net, of_task(call.query, call.query.x), nullptr, query.input);
    run.forward(query, theta(k), query_pass);
    const int out = graph().output;
    const T* z = net.value(query, out);
    T* dz = grad ? net.adjoint(query, out) : nullptr;
    const int64_t outputs = graph().values[out].size(), first = int64_t{task} * net.images;
    if (is_last && call.predictions) unload_output(net, z, call.predictions + first * outputs);
    if (is_last && call.statistics) write_statistics(net, call.statistics);
    if (call.prediction_adjoint) {
      load_output_adjoint(net, call.prediction_adjoint + first * outputs, dz);
    } else if (call.query.ids || call.query.values) {
      const T scale = weight * (call.task_weights ? call.task_weights[task] : T(1) / T(call.tasks));
      T* dy = call.grad_query_y ? call.grad_query_y + first * outputs : nullptr;
      const T value =
          loss_forward(loss(net), targets(call.query, nullptr), z, scale, probabilities(net, query), dz, dy);
      if (!finite(value, k, true, "loss")) return;
      if (call.step_losses && k > 0) call.step_losses[int64_t{task} * steps + k - 1] = value;
      if (call.task_losses) call.task_losses[task] += weight * value;
      const int64_t at = task * (int64_t{steps} + 1) + k;
      if (call.losses_by_step) call.losses_by_step[at] = value;
      const auto right = [&] { return accuracy(loss(net), targets(call.query, nullptr), z); };
      if (is_last && call.accuracy) call.accuracy[task] = right();
      if (call.accuracy_by_step) call.accuracy_by_step[at] = right();
    }
    if (!grad) return;
    run.backward(query, theta(k), query_pass, net.outer, grad);
    if (call.grad_query_x)
      add_input_adjoint(net, net.adjoint(query, 0), nullptr, of_task(call.query, call.grad_query_x));
  }

  // Batch mean and unbiased variance of every batch norm of the pass, in order of ops.
  void write_statistics(const Network<T>& net, T* out) const {
    int64_t channels = 0;
    for (const OpPlan<T>& op : net.ops)
      if (op.op.kind == OpKind::kBatchNorm) channels += op.out.shape.channels;
    unload_statistics(net, net.images, [&](size_t i) { return net.saved(query, i); }, out + 2 * task * channels);
  }

  // From dL/dtheta_{k+1} to dL/dtheta_k, both in `adjoint`. The Hessian-vector product is taken along -u, so that
  // everything it yields is added.
  void step_back(int k) {
    const T momentum = T(call.settings.momentum), decay = T(call.settings.weight_decay);
    for (int p = 0; p < packing.count(); ++p) {
      const RateView& rate = engine.rate_views_[p];
      if (rate.offset < 0) continue;
      const int64_t first = packing.offset(p), last = first + packing.size(p);
      if (rate_sum) add_rate_gradient(k, rate, first, last);
      with_rate(rate, k, first, [=, to = tangent, v_at = adjoint, carried = carry](const auto& rate_at) {
        for (int64_t i = first; i < last; i += S::kWidth) {
          const Vector v = S::load(v_at + i);
          Vector u = rate_at(i) * v;
          if (carried) {
            u += S::load(carried + i);
            S::store(carried + i, momentum * u);
          }
          S::store(to + i, -u);
          if (decay != T(0)) S::store(v_at + i, v - decay * u);
        }
      });
    }
    if (!call.settings.first_order) add_hessian_product(k);
  }

  // dL/dalpha_k -= v m_{k+1}
  void add_rate_gradient(int k, const RateView& rate, int64_t first, int64_t last) {
    T* sum_at = rate_sum + rate.offset + k * rate.row;
    const T* m = direction(k);
    Vector dot{};
    for (int64_t i = first; i < last; i += S::kWidth) {
      const Vector share = S::load(adjoint + i) * S::load(m + i);
      if (rate.per_element)
        S::store(sum_at + i - first, S::load(sum_at + i - first) - share);
      else
        dot += share;
    }
    for (int i = 0; !rate.per_element && i < S::kWidth; ++i) *sum_at -= dot[i];
  }

  void add_hessian_product(int k) {
    const Network<T>& net = *plan.support;
    const int out = graph().output;
    if (!net.moves[out]) return;
    if (!kept(k)) evaluate(k, nullptr);
    const Frame<T>& frame = slot(k);
    const Passes<T> run = passes(net);
    const int64_t* rows = support_rows(k);
    run.tangent(frame, tangents, theta(k), tangent, pass(2 * k, k));
    const int64_t first = int64_t{task} * call.support.count, outputs = graph().values[out].size();
    loss_tangent(loss(net), targets(call.support, rows), net.value(frame, out), net.value(tangents, out),
                 probabilities(net, frame), net.adjoint(tangents, out),
                 call.grad_support_y ? call.grad_support_y + first * outputs : nullptr,
                 call.grad_support_weight ? call.grad_support_weight + first : nullptr);
    run.tangent_backward(frame, tangents, theta(k), tangent, pass(2 * k, k), adjoint);
    if (call.grad_support_x)
      add_input_adjoint(net, net.adjoint(tangents, 0), rows, of_task(call.support, call.grad_support_x));
  }

  void finish() {
    typename S::Bits poison{};
    const T* v = adjoint;
    const bool add = call.grad_parameters && !alone();
    for (int64_t i = 0; i < size; i += S::kWidth) poison |= S::poison(S::load(v + i));
    if (!finite(poison, v, 0, "the meta-gradient")) return;
    for (int64_t i = 0; add && i < size; ++i) sum[i] += v[i];
    if (call.grad_initial) packing.unpack_all(adjoint, call.grad_initial + task * packing.flat_size());
  }
};

}  // namespace metaaug::METAAUG_ISA
