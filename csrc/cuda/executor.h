// The engine itself, compiled by nvcc for the device and by the host's compiler for the emulation.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "../fuse.h"
#include "engine.h"
#include "kernels.h"
#include "plan.h"
#include "sampler.h"

namespace metaaug::cuda {

template <class T>
class Executor final : public Engine<T> {
 public:
  Executor(const Graph& graph, void* stream) : graph_(fuse(graph, true)), limits_(Limits::of_current_device()) {
    refuse_to_plan(capturing(stream));
    offsets_.push_back(0);
    for (const Parameter& p : graph.parameters) offsets_.push_back(offsets_.back() + p.size());
    at_most(kMostElements, "parameters", offsets_.back());
    allow_shared_memory(run_tasks<T>);
    failed_.resize(1);
    *failed_.data() = 0;
    failures_.assign(std::vector<unsigned long long>(kFailures, Failure::kNone), stream);
  }

  NonFinite run(const Call<T>& call, const Resources& resources, bool wait_for_it) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool captured = capturing(resources.stream);
    if (captured)
      refuse_to_repeat();
    else if (*failed_.data())
      if (const NonFinite earlier = take_failure(resources.stream, -1); earlier.task >= 0) return earlier;
    Arguments<T> a = arguments(call, resources.stream);
    const int64_t row_bytes = std::max<int64_t>(a.row_size * int64_t(sizeof(T)), 1);
    const int chunk = int(std::clamp<int64_t>(kept_bytes() / row_bytes, 1, call.tasks));
    const Teams teams = plan_teams(a, chunk);
    a.regions = teams.layout.regions;
    if (a.regions.in_workspace) {
      a.workspace_size = teams.layout.size;
      a.workspace = allocate(resources, teams.count * teams.layout.size);
    }
    const size_t states_size = teams.count * sizeof(TeamState);
    if (teams.members > 1) a.team_states = static_cast<TeamState*>(resources.allocate(int64_t(states_size)));
    a.rows_out = allocate(resources, chunk * a.row_size);
    const int turn = turn_++ % kFailures;
    a.failure = failures_.data() + turn;
    for (int first = 0; first < call.tasks; first += chunk) {
      a.first_task = first;
      a.tasks = std::min(chunk, call.tasks - first);
      if (teams.members > 1) clear(a.team_states, states_size, resources.stream);
      launch(run_tasks<T>, std::min(teams.count, a.tasks), teams.members, teams.shared_bytes, resources.stream, a);
      const auto sum = [&](T* to, int64_t at, int64_t columns, T scale) {
        if (!to || columns == 0) return;
        const Columns<T> c{a.rows_out, a.tasks, a.row_size, at, columns, to, scale, first > 0};
        launch(sum_columns<T>, int(std::min<int64_t>((columns + kWarp - 1) / kWarp, kMostTeams)), 1,
               kThreads * int64_t(sizeof(T)), resources.stream, c);
      };
      sum(call.grad_parameters, 0, a.flat, T(1));
      sum(call.mean_displacement, 0, a.flat, T(1) / T(call.tasks));
      sum(call.grad_rates, a.row_size - a.rates, a.rates, T(1));
    }
    return (wait_for_it || waits_) && !captured ? take_failure(resources.stream, turn) : NonFinite();
  }

  Footprint footprint(const Settings& settings, int samples, void* stream) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    static const T something = 0;
    static T result = 0;
    Call<T> call;
    call.settings = settings;
    call.tasks = 1;
    call.parameters.assign(graph_.parameters.size(), &something);
    call.rates.assign(graph_.parameters.size(), {&something, false, false});
    call.wanted.assign(graph_.parameters.size(), true);
    call.support.count = call.query.count = samples;
    call.support.x = call.query.x = &something;
    call.grad_parameters = &result;
    return {Layout(arguments(call, stream), 1, 0).size * int64_t(sizeof(T)), limits_.shared_bytes};
  }

 private:
  static constexpr int kPlannedSizes = 32, kMostSlots = 16;

  // A network, and whether a graph has captured where its arrays lie, which then stay there.
  struct Planned {
    std::unique_ptr<Network> network;
    bool captured = false;
  };

  T* allocate(const Resources& resources, int64_t elements) const {
    return elements ? static_cast<T*>(resources.allocate(elements * int64_t(sizeof(T)))) : nullptr;
  }

  static void refuse_to_plan(bool captured) {
    if (captured)
      throw std::invalid_argument("a call must have run before it is captured in a CUDA graph: it allocates memory");
  }

  void refuse_to_repeat() const {
    for (const Op& op : graph_.ops)
      if (op.kind == OpKind::kDropout)
        throw std::invalid_argument(
            "a model with dropout cannot be captured in a CUDA graph: every replay would drop the same");
  }

  const Network& network(int images, const std::vector<char>& adapted, const std::vector<char>& wanted,
                         bool wants_input, bool repeats, void* stream) {
    const bool captured = capturing(stream);
    Planned& planned = networks_[std::make_tuple(images, adapted, wanted, wants_input, repeats)];
    if (!planned.network) {
      refuse_to_plan(captured);
      planned.network =
          std::make_unique<Network>(graph_, offsets_, images, adapted, wanted, wants_input, repeats, stream);
    }
    planned.captured |= captured;
    return *planned.network;
  }

  // Forgets all networks but those of graphs, where there are many.
  void make_room(void* stream) {
    const auto captured = [](const auto& entry) { return entry.second.captured; };
    if (std::count_if(networks_.begin(), networks_.end(), captured) + kPlannedSizes >= int64_t(networks_.size()) ||
        capturing(stream))
      return;
    wait(stream);
    for (auto each = networks_.begin(); each != networks_.end();)
      each = captured(*each) ? ++each : networks_.erase(each);
  }

  Arguments<T> arguments(const Call<T>& call, void* stream) {
    const int count = int(graph_.parameters.size());
    const Settings& s = call.settings;
    Arguments<T> a{};
    std::vector<char> adapted(count), updated(count), wanted(call.wanted);
    for (int p = 0; p < count; ++p) {
      adapted[p] = call.rates[p].data != nullptr;
      wanted[p] |= adapted[p] || call.grad_initial != nullptr;
    }
    make_room(stream);
    a.has_support = s.steps > 0;
    a.has_query = call.query.x != nullptr;
    if (a.has_support) {
      const int images = call.support.rows ? call.support.batch : call.support.count;
      const Network& net = network(images, adapted, wanted, call.grad_support_x != nullptr, !call.support.rows, stream);
      a.support = net.program();
      updated = net.updated();
    }
    if (a.has_query)
      a.query = network(call.query.count, adapted, wanted, call.grad_query_x != nullptr, false, stream).program();
    a.reverse = call.reverse();
    a.keep_path = a.reverse && a.has_support && (!s.first_order || call.step_weights);
    a.keep_directions = call.grad_rates != nullptr;
    a.remembers = a.keep_directions || s.momentum != 0;
    a.all_tasks = call.tasks;
    a.steps = s.steps;
    a.first_step = s.first_step;
    a.loss = s.loss;
    a.optimizer = s.optimizer;
    a.precision = s.precision;
    a.first_order = s.first_order;
    a.label_smoothing = s.label_smoothing;
    a.momentum = s.momentum;
    a.weight_decay = s.weight_decay;
    a.beta1 = s.beta1;
    a.beta2 = s.beta2;
    a.eps = s.eps;
    a.seed = s.seed;
    a.parameters = count;
    a.flat = offsets_.back();
    std::copy(offsets_.begin(), offsets_.end(), a.offset);
    for (int p = 0; p < count; ++p) {
      a.parameter[p] = call.initial ? nullptr : call.parameters[p];
      const Rate<T>& rate = call.rates[p];
      a.rate[p] = rate.data;
      a.rate_form[p] = (unsigned char)((rate.per_step ? kPerStep : 0) | (rate.per_element ? kPerElement : 0) |
                                       (updated[p] ? kUpdatedByOp : 0));
      if (!rate.data) continue;
      a.rate_offset[p] = int(a.rates);
      a.rates += (rate.per_step ? s.steps : 1) * (rate.per_element ? graph_.parameters[p].size() : 1);
    }
    at_most(kMostElements, "values of inner_lr", a.rates);
    at_most(Failure::kMostSteps, "steps", s.steps);
    std::copy(call.buffers.begin(), call.buffers.end(), a.frozen);
    a.support_x = call.support.x;
    a.support_y = call.support.values;
    a.support_ids = call.support.ids;
    a.support_weight = call.support.weight;
    a.rows = call.support.rows;
    a.supports = call.support.count;
    a.batch = call.support.batch;
    a.query_x = call.query.x;
    a.query_y = call.query.values;
    a.query_ids = call.query.ids;
    a.queries = call.query.count;
    a.initial = call.initial;
    a.step_weights = call.step_weights;
    a.task_weights = call.task_weights;
    a.flat_adjoint = call.flat_adjoint;
    a.prediction_adjoint = call.prediction_adjoint;
    a.out_flat = call.flat;
    a.task_losses = call.task_losses;
    a.step_losses = call.step_losses;
    a.accuracy = call.accuracy;
    a.losses_by_step = call.losses_by_step;
    a.accuracy_by_step = call.accuracy_by_step;
    a.predictions = call.predictions;
    a.statistics = call.statistics;
    a.grad_initial = call.grad_initial;
    a.grad_support_x = call.grad_support_x;
    a.grad_support_y = call.grad_support_y;
    a.grad_support_weight = call.grad_support_weight;
    a.grad_query_x = call.grad_query_x;
    a.grad_query_y = call.grad_query_y;
    a.sums_gradient = call.grad_parameters != nullptr;
    a.sums_displacement = call.mean_displacement != nullptr;
    a.sums_rates = call.grad_rates != nullptr;
    a.row_size = (a.sums_gradient || a.sums_displacement ? a.flat : 0) + (a.sums_rates ? a.rates : 0);
    for (const Op& op : graph_.ops)
      if (op.kind == OpKind::kBatchNorm) a.norm_channels += graph_.values[op.output].channels;
    a.failed = failed_.data();
    return a;
  }

  struct Teams {
    int count = 0, members = 1;  // count: at once; a team takes one task after the other
    Layout layout;
    int64_t shared_bytes = 0;
  };

  // A block takes a task whose buffers fit in its shared memory, and where there are more tasks than multiprocessors in
  // half of what one has. Larger ones are in the workspace, and where blocks are idle a team of them takes a task.
  Teams plan_teams(const Arguments<T>& a, int tasks) const {
    Teams teams;
    const int processors = limits_.multiprocessors;
    teams.count = std::min(tasks, kMostTeams);
    for (int together = tasks > processors ? kTogether : 1; together > 0; --together) {
      const int64_t share = std::min(limits_.shared_bytes, limits_.shared_bytes_of_all / together - kReserved);
      for (int kept = slots(a, std::min(teams.count, processors * together)); kept > 0; --kept) {
        teams.layout = Layout(a, kept, 0);
        teams.shared_bytes = teams.layout.size * int64_t(sizeof(T));
        if (teams.shared_bytes <= share) return teams;
      }
    }
    teams.shared_bytes = kTileShared * int64_t(sizeof(T));
    const int blocks = std::max(resident(limits_, run_tasks<T>, teams.shared_bytes), 1);
    teams.count = std::min(teams.count, blocks);
    teams.members = std::min(blocks / teams.count, kMostMembers);
    teams.layout = Layout(a, slots(a, teams.count), teams.members);
    return teams;
  }

  // How many steps' frames are kept.
  int slots(const Arguments<T>& a, int teams) const {
    if (!a.has_support || !a.reverse || a.first_order) return 1;
    const int64_t bytes = Layout::frame(a.support, a.loss, a.rows != nullptr) * int64_t(sizeof(T));
    return int(std::clamp<int64_t>(kept_bytes() / (bytes * teams), 1, std::min(a.steps, kMostSlots)));
  }

  // What the device has reported, when it is done: the failure of the call that was queued first. `turn` is that of the
  // present call.
  NonFinite take_failure(void* stream, int turn) {
    wait(stream);
    if (!*failed_.data()) return {};
    *failed_.data() = 0;
    std::vector<unsigned long long> words(kFailures);
    from_device(words.data(), failures_.data(), words.size() * sizeof(words[0]), stream);
    NonFinite first;
    for (int i = 0; i < kFailures && first.task < 0; ++i) {
      const int at = (turn_ + i) % kFailures;
      if (words[at] == Failure::kNone) continue;
      first = Failure::read(words[at]);
      first.earlier = at != turn;
    }
    std::fill(words.begin(), words.end(), Failure::kNone);
    failures_.assign(words, stream);
    return first;
  }

  static constexpr int kMostTeams = 32768, kMostMembers = 32, kFailures = 64;
  static constexpr int64_t kReserved = 1 << 10;  // what the system takes of each block's shared memory

  const Graph graph_;
  const Limits limits_;
  const bool waits_ = std::getenv("METAAUG_SYNC") && std::string(std::getenv("METAAUG_SYNC")) == "1";
  std::vector<int64_t> offsets_;
  Array<unsigned long long, DeviceMemory> failures_;  // of the last calls, in turns
  Array<int, SharedMemory> failed_;                   // whether there is one
  unsigned turn_ = 0;
  std::map<std::tuple<int, std::vector<char>, std::vector<char>, bool, bool>, Planned> networks_;
  std::mutex mutex_;
};

template <class T>
std::unique_ptr<Engine<T>> make_engine(const Graph& graph, void* stream) {
  return std::make_unique<Executor<T>>(graph, stream);
}

template <class T>
void draw_episodes(const Episodes<T>& episodes, void* stream) {
  if (capturing(stream))
    throw std::invalid_argument("episodes cannot be drawn in a CUDA graph: every replay would draw the same ones");
  at_most(kMostElements, "values in a task's support or query set",
          int64_t{std::max(episodes.shots, episodes.queries)} * episodes.ways * episodes.sample);
  const Limits limits = Limits::of_current_device();
  if (episodes.shared_bytes() > limits.shared_bytes)
    throw std::invalid_argument("ways * (1 + shots + queries) must be at most " +
                                std::to_string(limits.shared_bytes / int64_t(sizeof(int64_t))) + " on this GPU (got " +
                                std::to_string(episodes.shared_bytes() / int64_t(sizeof(int64_t))) + ")");
  allow_shared_memory(sample_episodes<T>);
  launch(sample_episodes<T>, std::min(episodes.tasks, 32768), 1, episodes.shared_bytes(), stream, episodes);
}

}  // namespace metaaug::cuda
