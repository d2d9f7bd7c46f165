// One task by one team: K steps forward, the query, K steps back; the recursions are those of cpu/executor.h. Every
// thread runs this; what is not spread over them by `each` is the same in all.
#pragma once

#include "arguments.h"
#include "passes.h"

namespace metaaug::cuda {

template <class T>
class Task {
 public:
  METAAUG_DEVICE Task(const Arguments<T>& a, int task)
      : a(a), task(task), row(a.rows_out + int64_t{task - a.first_task} * a.row_size) {
    const Regions& r = a.regions;
    sums = place(r.sums);
    path = place(r.path);
    gradient = place(r.gradient);
    tangent = place(r.tangent);
    directions = place(r.directions);
    second = place(r.second);
    carry = place(r.carry);
    rate_row = row + (a.row_size - (a.sums_rates ? a.rates : 0));
  }

  METAAUG_DEVICE void run() {
    start();
    for (int k = 0; k < a.steps; ++k) {
      if (a.by_step() || (!a.reverse && a.step_weights && k > 0)) judge(k, nullptr);
      step(k);
    }
    const T* last = theta(a.steps);
    if (a.out_flat) each(a.flat, [&](int i) { a.out_flat[task * a.flat + i] = last[i]; });
    for (int p = 0; a.sums_displacement && p < a.parameters; ++p)
      each_of(p, [&](int i, int at) { row[at] = last[at] - a.parameter[p][i]; });
    T* const adjoint = a.reverse ? gradient : nullptr;
    if (adjoint) clear(adjoint, a.flat);
    if (a.has_query) judge(a.steps, adjoint);
    if (!a.reverse) return;
    if (a.flat_adjoint) each(a.flat, [&](int i) { adjoint[i] = a.flat_adjoint[task * a.flat + i]; });
    if (carry) clear(carry, a.flat);
    const Frame<T> tangents = tangents_frame();
    if (tangents.carried) clear(tangents.carried, a.support.carried);
    sync();
    for (int k = a.steps - 1; k >= 0; --k) {
      step_back(k);
      if (a.step_weights && k > 0) judge(k, adjoint);
    }
    if (tangents.carried) passes(a.support).still_backward(slot(0), tangents, theta(0), adjoint);
    finish();
  }

 private:
  METAAUG_DEVICE T* place(int64_t region) const {
    if (region < 0) return nullptr;
    return (a.regions.in_workspace ? a.workspace + team() * a.workspace_size : reinterpret_cast<T*>(shared_memory())) +
           region;
  }

  METAAUG_DEVICE static void clear(T* values, int64_t size) {
    each(size, [&](int i) { values[i] = T(0); });
  }

  // Calls body(element, its place in theta) for a parameter's.
  template <class Body>
  METAAUG_DEVICE void each_of(int p, const Body& body) const {
    const int first = a.offset[p];
    each(a.size(p), [&](int i) { body(i, first + i); });
  }

  METAAUG_DEVICE T* theta(int k) const { return path + (a.keep_path ? k : k % 2) * a.regions.path_stride; }
  METAAUG_DEVICE T* direction(int k) const { return directions + (a.keep_directions ? k * a.flat : 0); }
  METAAUG_DEVICE bool kept(int k) const { return k >= a.steps - a.regions.slots_kept; }
  METAAUG_DEVICE Pass pass(int index, int step) const { return {step, a.seed, uint32_t(task), uint32_t(index)}; }
  METAAUG_DEVICE Passes<T> passes(const Program& net) const {
    return {net, a.frozen, {a.regions.in_workspace, place(a.regions.partials), a.precision}};
  }

  METAAUG_DEVICE Frame<T> frame(T* memory, const Program& net) const {
    Frame<T> f;
    f.values = memory;
    f.adjoints = f.values + net.values;
    f.saved = f.adjoints + net.adjoints;
    f.input = f.saved + net.saved + net.probabilities(a.loss);
    return f;
  }

  METAAUG_DEVICE Frame<T> slot(int k) const {
    Frame<T> f = frame(place(a.regions.slots) + k % a.regions.slots_kept * a.regions.slot, a.support);
    if (!a.rows) f.input = place(a.regions.input);
    f.still = place(a.regions.still);
    return f;
  }

  METAAUG_DEVICE Frame<T> tangents_frame() const {
    Frame<T> f;
    f.values = place(a.regions.tangents);
    f.adjoints = f.values + a.support.values;
    f.saved = f.adjoints + a.support.adjoints;
    f.carried = place(a.regions.carried);
    return f;
  }

  METAAUG_DEVICE static T* probabilities(const Program& net, const Frame<T>& f) { return f.saved + net.saved; }

  METAAUG_DEVICE LossPlan<T> loss(const Program& net) const {
    LossPlan<T> plan;
    plan.kind = a.loss;
    plan.images = net.images;
    plan.classes = int(net.result.size());
    plan.stride = plan.classes;
    plan.smoothing = T(a.label_smoothing);
    return plan;
  }

  METAAUG_DEVICE Targets<T> targets(const int64_t* ids, const T* values, const T* weight, int count,
                                    const int64_t* rows) const {
    const int64_t first = int64_t{task} * count;
    return {ids ? ids + first : nullptr, values ? values + first * outputs() : nullptr,
            weight ? weight + first : nullptr, rows};
  }
  METAAUG_DEVICE int64_t outputs() const { return (a.has_support ? a.support : a.query).result.size(); }
  METAAUG_DEVICE Targets<T> support_targets(int k) const {
    return targets(a.support_ids, a.support_y, a.support_weight, a.supports, rows(k));
  }
  METAAUG_DEVICE Targets<T> query_targets() const {
    return targets(a.query_ids, a.query_y, nullptr, a.queries, nullptr);
  }

  METAAUG_DEVICE const int64_t* rows(int k) const {
    return a.rows ? a.rows + (int64_t{task} * a.steps + k) * a.batch : nullptr;
  }

  // Calls body(n) for every row n of a pass. One thread has all rows of a sample, so that it may add to what is the
  // sample's.
  template <class Body>
  METAAUG_DEVICE static void each_row(int images, int samples, const int64_t* rows, const Body& body) {
    if (!rows) return each(images, [&](int n) { body(n); });
    each(samples, [&](int sample) {
      for (int n = 0; n < images; ++n)
        if (rows[n] == sample) body(n);
    });
  }

  // One thread of the team.
  METAAUG_DEVICE void fail(Failure::What what, int step, T value) {
    if (!has_failed) put_least(a.failure, Failure::word(task, step, what, double(value)));
    has_failed = true;
    *a.failed = 1;
  }

  METAAUG_DEVICE void check(T value, Failure::What what, int step) {
    if (thread() == 0 && !is_finite(value)) fail(what, step, value);
  }

  // A barrier, behind which it is said which is the first value that is not finite, if one of this thread's is.
  METAAUG_DEVICE void check_all(bool finite, const T* values, Failure::What what, int step) {
    if (!sync_or(!finite) || thread() != 0) return;
    int64_t i = 0;
    while (i + 1 < a.flat && is_finite(values[i])) ++i;
    fail(what, step, values[i]);
  }

  METAAUG_DEVICE void load(const Program& net, const T* x, int samples, const int64_t* rows, T* input) const {
    const int size = int(net.sample.size());
    const T* from = x + int64_t{task} * samples * size;
    each(net.images * size, [&](int i) { input[i] = from[rows ? rows[i / size] * size + i % size : i]; });
  }

  // Adds the input's adjoint to one in the user's layout; a thread has all that is added to an element.
  METAAUG_DEVICE void unload(const Program& net, const T* adjoint, int samples, const int64_t* rows, T* target) const {
    const int size = int(net.sample.size());
    T* to = target + int64_t{task} * samples * size;
    each(size, [&](int i) {
      for (int n = 0; n < net.images; ++n) to[(rows ? rows[n] : n) * size + i] += adjoint[n * size + i];
    });
  }

  METAAUG_DEVICE void start() {
    if (thread() == 0 && a.task_losses) a.task_losses[task] = T(0);
    for (int p = 0; p < a.parameters; ++p) {
      const T* const from = a.initial ? a.initial + task * a.flat + a.offset[p] : a.parameter[p];
      each_of(p, [&](int i, int at) { path[at] = from[i]; });
    }
    if (second) {
      clear(directions, a.flat);
      clear(second, a.flat);
    }
    if (a.sums_rates) clear(rate_row, a.rates);
    if (a.has_support && !a.rows) load(a.support, a.support_x, a.supports, nullptr, place(a.regions.input));
    sync();
  }

  // Activations and adjoints of step k at theta_k, whose gradient goes to `update` or, where that may not be, to
  // `gradient`; without `update`, activations and adjoints once more. The loss is the first warp's.
  METAAUG_DEVICE METAAUG_NOINLINE T evaluate(int k, const Update<T>* update) {
    const Program& net = a.support;
    const Frame<T> f = slot(k);
    const Passes<T> run = passes(net);
    if (a.rows) {
      load(net, a.support_x, a.supports, rows(k), f.input);
      sync();
    }
    run.forward(f, theta(k), pass(2 * k, k), k > 0 || !update);
    const LossPlan<T> plan = loss(net);
    const Targets<T> y = support_targets(k);
    const T* z = run.value_of(f, net.output);
    T *dz = run.adjoint_of(f, net.output), *p = probabilities(net, f);
    T total = 0;
    each(net.images, [&](int n) {
      const int at = n * plan.classes;
      total += plan.value(y, n, z + at, T(1), p + at, dz + at, static_cast<T*>(nullptr));
    });
    total = sum_all(total, sums);
    if (net.output_moves) run.step_backward(f, theta(k), pass(2 * k, k), update ? gradient : nullptr, update);
    return total;
  }

  METAAUG_DEVICE void step(int k) {
    T* const to = theta(k + 1);
    T* const direction = second ? directions : a.remembers ? this->direction(k) : nullptr;
    const T* const before = k > 0 && direction ? this->direction(k - 1) : nullptr;
    Update<T> update{a, k, theta(k), to, direction, before, second};
    if (second) {
      update.correction1 = T(1 - std::pow(a.beta1, double(k + 1)));
      update.correction2 = T(1 - std::pow(a.beta2, double(k + 1)));
    }
    for (int p = 0; p < a.parameters; ++p)
      if (!(a.rate_form[p] & kUpdatedByOp))
        each_of(p, [&](int, int at) {
          gradient[at] = T(0);
          if (!a.rate[p]) to[at] = theta(k)[at];
        });
    check(evaluate(k, &update), Failure::kLoss, k);
    for (int p = 0; p < a.parameters; ++p)
      if (a.rate[p] && !(a.rate_form[p] & kUpdatedByOp)) {
        const ParameterStep<T> step(update, p);
        each_of(p, [&](int i, int at) { step(i, gradient[at]); });
      }
    check_all(update.finite, to, Failure::kWeight, k);
  }

  // The query pass after k steps. With `grad`, adds its share of dL/dtheta_k there.
  METAAUG_DEVICE METAAUG_NOINLINE void judge(int k, T* grad) {
    const bool is_last = k == a.steps, wants_accuracy = a.accuracy_by_step || (is_last && a.accuracy);
    const T weight = a.step_weights && k > 0 ? a.step_weights[k - 1] : T(is_last);
    if (weight == T(0) && !is_last && !a.step_losses && !a.by_step()) return;
    const Program& net = a.query;
    const Passes<T> run = passes(net);
    const int behind = a.first_step + k;
    const Pass query_pass = pass(2 * behind + 1, behind > 0 ? behind - 1 : 0);
    const Frame<T> f = frame(place(a.regions.tangents), net);
    load(net, a.query_x, a.queries, nullptr, f.input);
    sync();
    run.forward(f, theta(k), query_pass);
    const LossPlan<T> plan = loss(net);
    const T* z = run.value_of(f, net.output);
    T* dz = grad ? run.adjoint_of(f, net.output) : nullptr;
    const int64_t outputs = net.result.size(), size = net.images * outputs, first = task * size;
    if (is_last && a.predictions) each(size, [&](int i) { a.predictions[first + i] = z[i]; });
    if (is_last && a.statistics) write_statistics(net, f);
    if (a.prediction_adjoint) {
      if (dz) each(size, [&](int i) { dz[i] = a.prediction_adjoint[first + i]; });
      sync();
    } else if (a.query_ids || a.query_y) {
      const T scale = weight * (a.task_weights ? a.task_weights[task] : T(1) / T(a.all_tasks));
      T* dy = a.grad_query_y ? a.grad_query_y + first : nullptr;
      const Targets<T> y = query_targets();
      T total = 0, right = 0;
      each(net.images, [&](int n) {
        const int64_t at = n * outputs;
        total += plan.value(y, n, z + at, scale, probabilities(net, f) + at, dz ? dz + at : nullptr, dy);
        if (wants_accuracy) right += T(plan.right(y, n, z + at));
      });
      total = sum_all(total, sums);
      if (wants_accuracy) right = sum_all(right, sums + warps());
      check(total, Failure::kQueryLoss, k);
      if (thread() == 0) {
        if (a.step_losses && k > 0) a.step_losses[int64_t{task} * a.steps + k - 1] = total;
        if (a.task_losses) a.task_losses[task] += weight * total;
        if (is_last && a.accuracy) a.accuracy[task] = right / T(net.images);
        const int64_t at = task * (int64_t{a.steps} + 1) + k;
        if (a.losses_by_step) a.losses_by_step[at] = total;
        if (a.accuracy_by_step) a.accuracy_by_step[at] = right / T(net.images);
      }
    }
    if (!grad) return;
    run.backward(f, theta(k), query_pass, grad);
    if (a.grad_query_x) unload(net, run.adjoint_of(f, 0), a.queries, nullptr, a.grad_query_x);
    sync();
  }

  // Batch mean and unbiased variance of every batch norm of the pass, in order of ops.
  METAAUG_DEVICE void write_statistics(const Program& net, const Frame<T>& f) const {
    T* to = a.statistics + int64_t{task} * 2 * a.norm_channels;
    for (int i = 0; i < net.count; ++i) {
      const Node& node = net.nodes[i];
      if (node.op.kind != OpKind::kBatchNorm) continue;
      const int channels = node.out.channels;
      const T count = T(net.images) * T(node.in[0].pixels());
      const T* saved = f.saved + node.saved;
      each(channels, [&](int c) {
        to[c] = saved[BatchNorm<T, false, false>::kSaved * c];
        to[channels + c] =
            saved[BatchNorm<T, false, false>::kSaved * c + 2] * (count / (count > T(1) ? count - T(1) : T(1)));
      });
      to += 2 * channels;
    }
  }

  // From dL/dtheta_{k+1} to dL/dtheta_k, both in `gradient`. The Hessian-vector product is taken along -u, so that
  // everything it yields is added.
  METAAUG_DEVICE void step_back(int k) {
    T* v = gradient;
    if (a.sums_rates) add_rate_gradients(k, v);
    const T decay = T(a.weight_decay), momentum = T(a.momentum);
    for (int p = 0; p < a.parameters; ++p) {
      const Rates<T> rates(a, p, k);
      if (!rates.values) continue;
      each_of(p, [&](int i, int at) {
        T u = rates[i] * v[at];
        if (carry) {
          u += carry[at];
          carry[at] = momentum * u;
        }
        if (tangent) tangent[at] = -u;
        v[at] -= decay * u;
      });
    }
    sync();
    if (!a.first_order) add_hessian_product(k);
  }

  // dL/dalpha_k -= v m_{k+1}
  METAAUG_DEVICE void add_rate_gradients(int k, const T* v) {
    const T* m = direction(k);
    for (int p = 0; p < a.parameters; ++p) {
      if (!a.rate[p]) continue;
      const bool per_element = a.rate_form[p] & kPerElement;
      T* const to =
          rate_row + a.rate_offset[p] + (a.rate_form[p] & kPerStep ? k * int64_t{per_element ? a.size(p) : 1} : 0);
      if (per_element) {
        each_of(p, [&](int i, int at) { to[i] -= v[at] * m[at]; });
      } else {
        T sum = 0;
        each_of(p, [&](int, int at) { sum += v[at] * m[at]; });
        sum = sum_all(sum, sums);
        if (thread() == 0) *to -= sum;
        sync();  // the next one's sums
      }
    }
  }

  METAAUG_DEVICE void add_hessian_product(int k) {
    const Program& net = a.support;
    if (!net.output_moves) return;
    if (!kept(k)) evaluate(k, nullptr);
    const Frame<T> f = slot(k), tangents = tangents_frame();
    const Passes<T> run = passes(net);
    const LossPlan<T> plan = loss(net);
    const Targets<T> y = support_targets(k);
    run.tangent(f, tangents, theta(k), tangent, pass(2 * k, k));
    const T *z = run.value_of(f, net.output), *z_t = tangents.values + net.places[net.output].value;
    T *dz_t = run.adjoint_of(tangents, net.output), *p = probabilities(net, f);
    const int64_t first = int64_t{task} * a.supports;
    T* dy_t = a.grad_support_y ? a.grad_support_y + first * plan.classes : nullptr;
    T* dw_t = a.grad_support_weight ? a.grad_support_weight + first : nullptr;
    each_row(net.images, a.supports, rows(k), [&](int n) {
      const int64_t at = int64_t{n} * plan.classes;
      plan.tangent(y, n, z + at, z_t + at, p + at, dz_t + at, dy_t, dw_t);
    });
    sync();
    run.tangent_backward(f, tangents, theta(k), tangent, pass(2 * k, k), gradient);
    if (a.grad_support_x) unload(net, run.adjoint_of(tangents, 0), a.supports, rows(k), a.grad_support_x);
    sync();
  }

  METAAUG_DEVICE void finish() {
    bool finite = true;
    each(a.flat, [&](int i) {
      finite &= is_finite(gradient[i]);
      if (a.sums_gradient) row[i] = gradient[i];
      if (a.grad_initial) a.grad_initial[task * a.flat + i] = gradient[i];
    });
    check_all(finite, gradient, Failure::kMetaGradient, 0);
  }

  const Arguments<T>& a;
  const int task;
  T* const row;
  T *sums, *path, *gradient, *tangent, *directions, *second, *carry, *rate_row;
  bool has_failed = false;
};

}  // namespace metaaug::cuda
