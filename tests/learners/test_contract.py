"""Every registered learner keeps the contract, and `check_learner` finds who does not, clause by clause."""

import copy

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.errors import ContractError
from metaaug_fast.learners import LEARNERS, Predictor, class_means, one_task_too
from metaaug_fast.models import conv4, perceptron

WAYS, FEATURES = 3, 6
OF_SENTENCES = {"prompt"}  # their own tests put them through the trials
registered = pytest.mark.parametrize("name", sorted(LEARNERS.keys() - OF_SENTENCES))


def class_tasks(*sample_shape, tasks=3, shots=2, queries=3):
    x = [torch.randn(tasks, WAYS * each, *sample_shape) for each in (shots, queries)]
    y = [torch.arange(WAYS).repeat(tasks, each) for each in (shots, queries)]
    return mf.TaskBatch(x[0], y[0], x[1], y[1])


def ways_of(name):
    return None if LEARNERS[name].encoder else WAYS


@registered
@pytest.mark.parametrize("mode", ["fresh", "trained", "evaluated"])
def test_vectors(name, mode):
    learner = LEARNERS[name](perceptron(ways_of(name), (FEATURES,), (16,), "tanh"))
    if mode == "trained":
        optimizers = learner.optimizers()
        for _ in range(3):
            learner.meta_step(class_tasks(FEATURES), optimizers)
    if mode == "evaluated":
        learner.eval()
    before = copy.deepcopy(learner.state_dict())
    report = mf.check_learner(learner, class_tasks(FEATURES))
    assert report.learner == LEARNERS[name].__name__
    tried = [clause for clause, outcome in report.clauses.items() if outcome == "kept"]
    assert len(tried) >= len(report.clauses) - (2 if learner.order_matters and learner.names_matter else 1)
    assert learner.training == (mode != "evaluated")
    for key, value in learner.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, before[key])


@registered
def test_pictures(name):
    learner = LEARNERS[name](conv4(ways_of(name), (2, 16, 16), hidden=4))
    report = mf.check_learner(learner, class_tasks(2, 16, 16))
    transductive = report.clauses["transductive says whether queries see each other"]
    assert transductive == ("not tried: it says that they do" if learner.transductive else "kept")


@registered
def test_every_learner_trains_from_a_model_alone(name):
    """With its own defaults, on classes that are easy to tell apart."""
    centres = 4 * torch.randn(30, FEATURES)
    labels = torch.arange(30).repeat_interleave(8)
    dataset = mf.data.ClassSamples.from_arrays(centres[labels] + 0.5 * torch.randn(len(labels), FEATURES), labels)
    episodes = mf.data.Episodes(dataset, ways=WAYS, shots=3, queries=3, tasks=8)
    learner = LEARNERS[name](perceptron(ways_of(name), (FEATURES,), (32,)))
    for _ in range(5):
        mf.train(learner, episodes, 300, progress=False)
        found = mf.evaluate(learner, episodes, 40).mean
        if found > 0.6:
            break
    assert found > 0.6  # of three classes


def test_regression_and_what_is_not_tried():
    tasks = mf.TaskBatch(*(torch.randn(2, 5, 1) for _ in range(4)))
    learner = mf.Reptile(perceptron(1, (1,), (8,)), inner_batch=2, loss="mse")
    clauses = mf.check_learner(learner, tasks).clauses
    assert clauses["predictions permute with the labels"] == "not tried: there are no classes"
    assert clauses["the order of support samples does not matter"].startswith("not tried: ")
    assert clauses["a resumed run is the uninterrupted one"] == "kept"


class Nearest(mf.Learner):
    """A user's own: class means of scaled inputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(FEATURES))

    @one_task_too
    def adapt(self, support_x, support_y):
        means = class_means(support_x * self.scale, support_y)
        return Predictor(lambda x: -torch.cdist(x * self.scale, means), len(support_x))


def test_a_users_own_learner_keeps_it():
    clauses = mf.check_learner(Nearest(), class_tasks(FEATURES)).clauses
    assert [clause for clause, outcome in clauses.items() if outcome != "kept"] == [
        "predictions permute with the labels"
    ]


class NoLoss(Nearest):
    def forward(self, tasks, *, steps=None):
        return super().forward(tasks, steps=steps).loss


class SummedLoss(Nearest):
    def forward(self, tasks, *, steps=None):
        out = super().forward(tasks, steps=steps)
        return mf.MetaOutput(out.task_losses.sum(), out.task_losses, out.accuracy)


class OnlyMany(Nearest):
    def adapt(self, support_x, support_y):
        return Nearest.adapt.__wrapped__(self, support_x, support_y)


class TasksMixed(Nearest):
    @one_task_too
    def adapt(self, support_x, support_y):
        means = class_means(support_x * self.scale, support_y).mean(0, keepdim=True)
        return Predictor(lambda x: -torch.cdist(x * self.scale, means.expand(len(x), -1, -1)), len(support_x))


class SeesLabels(Nearest):
    def forward(self, tasks, *, steps=None):
        everything = torch.cat([tasks.support_x, tasks.query_x], 1), torch.cat([tasks.support_y, tasks.query_y], 1)
        return self.adapt(*everything).evaluate(tasks.query_x, tasks.query_y)


class FirstCounts(Nearest):
    @one_task_too
    def adapt(self, support_x, support_y):
        means = support_x[:, :WAYS] * self.scale
        return Predictor(lambda x: -torch.cdist(x * self.scale, means), len(support_x))


class PrefersZero(Nearest):
    encoder = True

    @one_task_too
    def adapt(self, support_x, support_y):
        plain = Nearest.adapt.__wrapped__(self, support_x, support_y)
        return Predictor(lambda x: plain(x) + torch.tensor([1.0, 0.0, 0.0]), len(support_x))


class FairNearest(Nearest):
    encoder = True


class SecretlyTransductive(Nearest):
    @one_task_too
    def adapt(self, support_x, support_y):
        means = class_means(support_x * self.scale, support_y)
        return Predictor(lambda x: -torch.cdist((x - x.mean(1, keepdim=True)) * self.scale, means), len(support_x))


class Counting(Nearest):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    @one_task_too
    def adapt(self, support_x, support_y):
        self.seen += 1
        return Nearest.adapt.__wrapped__(self, support_x, support_y)


class Idle(Nearest):
    def meta_step(self, tasks, optimizers):
        return self(tasks)


class Forgetful(Nearest):
    """Its rate depends on what no checkpoint holds."""

    steps = 0

    def meta_step(self, tasks, optimizers):
        self.steps += 1
        optimizers[0].param_groups[0]["lr"] = 0.1 / self.steps
        return super().meta_step(tasks, optimizers)


class Swallows(Nearest):
    def forward(self, tasks, *, steps=None):
        return super().forward(tasks)


class Unfinished(mf.Learner):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (NoLoss, "forward gives a loss for every task: forward must return a MetaOutput (got Tensor)"),
        (SummedLoss, "forward gives a loss for every task: loss and the mean of task_losses must be equal"),
        (OnlyMany, "adapt takes one task: "),
        (TasksMixed, "each task is learned on its own: predictions of a task alone and beside others must be equal"),
        (SeesLabels, "adapt learns all tasks at once: losses of adapted.evaluate and of forward must be equal"),
        (FirstCounts, "the order of support samples does not matter: "),
        (PrefersZero, "predictions permute with the labels: predictions of renamed classes must be equal"),
        (SecretlyTransductive, "transductive says whether queries see each other: "),
        (Counting, "judging leaves no trace: seen must not change"),
        (Idle, "meta_step moves the learner: no parameter has moved"),
        (Forgetful, "a resumed run is the uninterrupted one: scale must be the same, bit for bit"),
        (Swallows, "what is wrong is refused by TypeError or ValueError: forward(tasks, steps=-1) must raise"),
        (Unfinished, "must write adapt(support_x, support_y)"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_contract_is_found_by_its_clause(broken, message):
    with pytest.raises(ContractError) as caught:
        mf.check_learner(broken(), class_tasks(FEATURES))
    assert str(caught.value).startswith(f"{broken.__name__}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encoders_classes_are_equal():
    assert (
        mf.check_learner(FairNearest(), class_tasks(FEATURES)).clauses["predictions permute with the labels"] == "kept"
    )


def test_bad_arguments():
    tasks = class_tasks(FEATURES)
    with pytest.raises(TypeError, match=r"learner must be a Learner \(got Linear\)"):
        mf.check_learner(nn.Linear(2, 2), tasks)
    with pytest.raises(TypeError, match="tasks must be a TaskBatch"):
        mf.check_learner(Nearest(), None)
    with pytest.raises(ValueError, match=r"tasks must hold at least two tasks \(got 1\)"):
        mf.check_learner(Nearest(), tasks[0])


@pytest.mark.parametrize("name", ["maml", "reptile"])
@pytest.mark.parametrize("options", [{}, {"inner_lr": [0.3, 0.2, 0.1]}])
@pytest.mark.parametrize("backend", ["fused", "fallback"])
def test_every_step_is_judged_in_one_pass(name, options, backend):
    """As by one pass for each number of steps, which is what the contract's default does."""
    model = perceptron(WAYS, (FEATURES,), (16,), "tanh")
    learner = LEARNERS[name](model, inner_steps=3, backend=backend, **options).double()
    tasks = class_tasks(FEATURES).to(torch.float64)
    found, expected = learner.by_step(tasks), mf.Learner.by_step(learner, tasks)
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.task_losses, other.task_losses, rtol=1e-10)
        assert torch.equal(one.accuracy, other.accuracy)
    assert len(learner.by_step(tasks, 1)) == 2
    episodes = mf.data.Episodes(mf.data.Sinusoids(), shots=3, queries=3, tasks=4)
    learner = LEARNERS[name](perceptron(1, (1,), (8,)), inner_steps=2, backend=backend, loss="mse")
    curve = mf.evaluate(learner, episodes, 8, by_step=True).by_step
    assert curve == pytest.approx([mf.evaluate(learner, episodes, 8, steps=k).mean for k in range(3)], rel=1e-5)


def test_learners_show_what_is_not_their_default():
    shown = repr(mf.MAML(perceptron(3, (4,)), inner_lr=0.1, inner_steps=3, first_order=True))
    assert shown.splitlines()[1].strip() == "inner_lr=0.1, inner_steps=3, first_order=True"
    assert "inner_batch=2" in repr(mf.Reptile(perceptron(3, (4,)), inner_batch=2))
