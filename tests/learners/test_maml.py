"""`MAML`: the meta-step against the reference, its parameters, and its life as an ordinary torch module."""

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaaug_fast.engine import reference
from metaaug_fast.engine.problem import Query, Support
from metaaug_fast.errors import NonFiniteError
from metaaug_fast.learners.maml import MAML
from metaaug_fast.tasks import MetaOutput, TaskBatch
from tests.building import C, F, Q, S, T, backends, perceptron, tasks
from tests.exactness import relative_error

K = 3


def model() -> nn.Sequential:
    return perceptron(nn.BatchNorm1d(7), nn.Tanh())


def reference_output(maml: MAML, batch: TaskBatch, step_weights: Tensor | None = None) -> MetaOutput:
    support, query = Support(batch.support_x, batch.support_y), Query(batch.query_x, batch.query_y, step_weights)
    return reference.meta_loss(maml.problem(), support, query)


def assert_gradients(out: MetaOutput, expected: MetaOutput, variables: list[Tensor]) -> None:
    """Of the loss; what is zero in one, such as of a bias in front of a batch norm, is so to rounding in the other."""
    assert relative_error(out.task_losses, expected.task_losses) < 1e-12
    found, wanted = (torch.autograd.grad(each.loss, variables) for each in (out, expected))
    scale = max(float(each.norm()) for each in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) < 1e-9 * max(float(other.norm()), 1e-6 * scale)


def rates(kind: str) -> Any:
    """`inner_lr` in one of the forms that it may have."""
    names = {name: value.shape for name, value in model().named_parameters()}
    return {
        "scalar": 0.3,
        "steps": [0.3, 0.2, 0.1],
        "tensors": {name: 0.1 + 0.01 * index for index, name in enumerate(names)},
        "elements": {name: torch.rand(shape) for name, shape in names.items()},
        "elements and steps": {name: torch.rand(K, *shape) for name, shape in names.items()},
    }[kind]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "first order": {"first_order": True},
    "momentum and decay": {"momentum": 0.7, "weight_decay": 0.1},
    "head only": {"adapt": ["3.*"]},
    "smoothed": {"label_smoothing": 0.2},
    "per step": {"batch_norm": "per_step"},
    "frozen": {"batch_norm": "frozen"},
}


@backends
@pytest.mark.parametrize("name", OPTIONS)
def test_the_meta_step_is_the_references(name: str, backend: str) -> None:
    maml, batch = MAML(model(), 0.3, K, backend=backend, **OPTIONS[name]), tasks()
    out, expected = maml(batch), reference_output(maml, batch)
    assert torch.equal(out.accuracy, expected.accuracy)
    assert relative_error(out.loss, expected.loss) < 1e-12
    assert_gradients(out, expected, [value for value in maml.parameters() if value.requires_grad])


@backends
@pytest.mark.parametrize("kind", ["scalar", "steps", "tensors", "elements", "elements and steps"])
def test_rates_are_learned_in_the_form_they_are_given(kind: str, backend: str) -> None:
    lr = rates(kind)
    maml, batch = MAML(model(), lr, K, learn_inner_lr=True, backend=backend), tasks()
    learned = [value.shape for name, value in maml.named_parameters() if name.startswith("inner_lr")]
    given = [torch.as_tensor(value).shape for value in (lr.values() if isinstance(lr, dict) else [lr])]
    assert sorted(learned) == sorted(given)
    assert_gradients(maml(batch), reference_output(maml, batch), list(maml.parameters()))


def test_a_fixed_rate_is_no_parameter() -> None:
    names = [name for name, _ in MAML(model(), 0.3).named_parameters()]
    assert names == [f"model.{name}" for name, _ in model().named_parameters()]


@backends
def test_losses_after_each_step_can_be_weighted(backend: str) -> None:
    maml, batch = MAML(model(), 0.3, K, backend=backend), tasks()
    weights = torch.rand(K).double()
    assert_gradients(maml(batch, step_weights=weights), reference_output(maml, batch, weights), list(maml.parameters()))


@backends
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("batch_norm", ["batch", "per_step"])
def test_other_steps_go_on_with_the_last_rate_and_affine(batch_norm: str, steps: int, backend: str) -> None:
    maml, batch = MAML(model(), rates("steps"), K, batch_norm=batch_norm, learn_inner_lr=True, backend=backend), tasks()
    with torch.no_grad():
        for value in maml.per_step.values():
            value += torch.rand_like(value)
    other = copy.deepcopy(maml)
    other.inner_lr = nn.Parameter(torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1][:steps], dtype=torch.float64))
    other.inner_steps = steps
    for key, value in other.per_step.items():
        other.per_step[key] = nn.Parameter(value.detach()[[0, 1, 2, 2, 2]])
    assert relative_error(maml(batch, steps=steps).task_losses, other(batch).task_losses) < 1e-12
    fast, expected = (learner.adapt(batch.support_x, batch.support_y, steps=steps) for learner in (maml, other))
    assert relative_error(fast(batch.query_x), expected(batch.query_x)) < 1e-12


@backends
def test_per_step_affines_replace_the_models_own(backend: str) -> None:
    net, batch = model(), tasks()
    maml = MAML(net, 0.3, K, batch_norm="per_step", backend=backend)
    assert {tuple(value.shape) for value in maml.per_step.values()} == {(K, 7)}
    before = maml(batch).loss
    assert relative_error(before, MAML(copy.deepcopy(net), 0.3, K, adapt=["0.*", "3.*"])(batch).loss) < 1e-12
    assert not net[1].weight.requires_grad
    before.backward()
    assert all(value.grad is not None and value.grad.any() for value in maml.per_step.values())
    with torch.no_grad():
        net[1].weight.add_(1)
        assert relative_error(maml(batch).loss, before) < 1e-12
        for value in maml.per_step.values():
            value += torch.rand_like(value)
    fast = maml.adapt(batch.support_x, batch.support_y)
    assert fast.as_dict()["1.weight"].shape == (T, 7)
    assert torch.equal(fast.as_dict()["1.weight"][0], maml.per_step["1/weight"][-1])
    assert relative_error(fast.module(2)(batch.query_x[2]), fast(batch.query_x)[2]) < 1e-12
    assert relative_error(fast.evaluate(batch.query_x, batch.query_y).loss, maml(batch).loss) < 1e-12


@backends
def test_running_statistics_are_learned_in_training_and_used_in_evaluation(backend: str) -> None:
    net, batch = model(), tasks()
    maml = MAML(net, 0.3, batch_norm="running", backend=backend)
    maml(batch)
    assert int(net[1].num_batches_tracked) == 1
    before = net[1].running_mean.clone()
    maml.eval()
    whole = maml.adapt(batch.support_x, batch.support_y)(batch.query_x)
    alone = maml.adapt(batch.support_x, batch.support_y)(batch.query_x[:, :1])
    assert relative_error(alone, whole[:, :1]) < 1e-12
    assert torch.equal(net[1].running_mean, before)


# --- an ordinary torch module ---


@backends
def test_it_learns_with_a_torch_optimizer_and_scheduler(backend: str) -> None:
    maml = MAML(model().float(), 0.1, 2, learn_inner_lr=True, backend=backend)
    batch = tasks().to(torch.float32)
    optimizer = torch.optim.Adam(maml.parameters(), 0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    first = maml(batch).loss.item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = maml(batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert loss.item() < 0.6 * first


def test_the_problem_is_built_once_and_again_after_a_change() -> None:
    maml = MAML(model(), 0.3, learn_inner_lr=True)
    problem = maml.problem()
    assert maml.problem() is problem
    optimizer = torch.optim.SGD(maml.parameters(), 0.1)
    maml(tasks()).loss.backward()
    optimizer.step()
    assert maml.problem() is problem
    assert problem.rates["0.weight"].value.item() == maml.inner_lr.item() != 0.3


@backends
@pytest.mark.parametrize(
    "change",
    [
        lambda maml: setattr(maml, "first_order", True),
        lambda maml: setattr(maml, "inner_steps", 4),
        lambda maml: setattr(maml, "inner_lr", 0.05),
        lambda maml: setattr(maml, "adapted", "3.*"),
        lambda maml: setattr(maml, "label_smoothing", 0.3),
        lambda maml: setattr(maml.model, "3", nn.Linear(7, C).double()),
        lambda maml: setattr(maml.model, "2", nn.Sigmoid()),
        lambda maml: maml.model[0].requires_grad_(False),
        lambda maml: setattr(maml.model[3], "bias", nn.Parameter(torch.rand(C).double())),
    ],
)
def test_a_changed_setting_or_module_counts_at_once(change: Callable[[MAML], object], backend: str) -> None:
    maml, batch = MAML(model(), 0.3, 2, backend=backend), tasks()
    (before,) = torch.autograd.grad(maml(batch).loss, maml.model[3].weight)
    change(maml)
    (after,) = torch.autograd.grad(maml(batch).loss, maml.model[3].weight)
    (expected,) = torch.autograd.grad(reference_output(maml, batch).loss, maml.model[3].weight)
    assert relative_error(after, expected) < 1e-9
    assert relative_error(after, before) > 1e-6


@backends
@pytest.mark.parametrize("kind", ["steps", "elements"])
def test_state_dict_and_copies(kind: str, backend: str) -> None:
    options = {"inner_steps": K, "batch_norm": "per_step", "learn_inner_lr": True, "backend": backend}
    lr = rates(kind)
    if isinstance(lr, dict):
        lr = {name: value for name, value in lr.items() if not name.startswith("1.")}
    maml, batch = MAML(model(), lr, **options), tasks()
    with torch.no_grad():
        for value in maml.parameters():
            value += 0.1 * torch.rand_like(value)
    expected = maml(batch).loss
    file = io.BytesIO()
    torch.save(maml.state_dict(), file)
    file.seek(0)
    loaded = MAML(model(), lr, **options)
    loaded.load_state_dict(torch.load(file))
    twin = copy.deepcopy(maml)
    assert torch.equal(loaded(batch).loss, expected)
    assert torch.equal(twin(batch).loss, expected)
    with torch.no_grad():
        for value in twin.parameters():
            value.zero_()
    assert torch.equal(maml(batch).loss, expected)


@backends
def test_it_can_be_converted(backend: str) -> None:
    maml, batch = MAML(model().float(), [0.3, 0.2, 0.1], K, learn_inner_lr=True, backend=backend), tasks()
    single = maml(batch.to(torch.float32)).loss
    maml.double()
    double = maml(batch).loss
    assert double.dtype == torch.float64
    assert relative_error(single.double(), double) < 1e-4
    assert_gradients(maml(batch), reference_output(maml, batch), list(maml.parameters()))
    maml.model.float()
    with pytest.raises(ValueError, match=r"inner_lr must have the model's dtype torch.float32 .*convert the learner"):
        maml(batch.to(torch.float32))


@backends
def test_modes_and_no_grad(backend: str) -> None:
    net = nn.Sequential(nn.Linear(F, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, C)).double()
    maml, batch = MAML(net, 0.3, backend=backend), tasks()
    assert not torch.equal(maml(batch).loss, maml(batch).loss)
    assert torch.equal(maml.eval()(batch).loss, maml(batch).loss)
    with torch.no_grad():
        out = maml(batch)
    assert not out.loss.requires_grad
    assert torch.equal(out.loss, maml(batch).loss)


@backends
def test_a_learned_rate_may_become_negative(backend: str) -> None:
    maml, batch = MAML(model(), 0.3, learn_inner_lr=True, backend=backend), tasks()
    with torch.no_grad():
        maml.inner_lr.fill_(-0.1)
    maml.eval()
    assert_gradients(maml(batch), reference_output(maml, batch), list(maml.parameters()))


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes, each with its share of the tasks, take the step that one takes with all of them."""
    start, shares = model(), [tasks(), tasks()]
    learners = {
        backend: MAML(copy.deepcopy(start), 0.3, K, learn_inner_lr=True, backend=backend)
        for backend in ("fused", "fallback")
    }
    torch.save((learners, shares), tmp_path / "given")
    program = Path(__file__).with_name("distributed.py")
    ranks = [subprocess.Popen([sys.executable, program, str(rank), tmp_path]) for rank in range(2)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    whole = TaskBatch(*map(torch.cat, zip(*(vars(share).values() for share in shares), strict=True)))
    for backend, maml in learners.items():
        for found, share in ((first, shares[0]), (second, shares[1])):
            assert torch.equal(found[backend]["loss"], maml(share).loss.detach()), backend
        maml(whole).loss.backward()
        for name, value in maml.named_parameters():
            gradient = first[backend][name]
            assert torch.equal(gradient, second[backend][name]), (backend, name)
            assert (gradient - value.grad).norm() < 1e-9 * max(value.grad.norm(), 1e-3), (backend, name)


@backends
def test_gradients_reach_the_support_data(backend: str) -> None:
    maml, batch = MAML(model(), 0.3, K, backend=backend), tasks()
    soft = torch.randn(T, S, C).double().softmax(-1).requires_grad_()
    batch = TaskBatch(batch.support_x.requires_grad_(), soft, batch.query_x, batch.query_y.clone())
    soft_query = TaskBatch(batch.support_x, soft, batch.query_x, torch.randn(T, Q, C).double().softmax(-1))
    assert_gradients(maml(soft_query), reference_output(maml, soft_query), [batch.support_x, soft])


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_lr": -0.1}, r"inner_lr must be >= 0 and finite \(got -0.1\)"),
        ({"inner_lr": -0.1, "learn_inner_lr": True}, r"inner_lr must be >= 0 and finite \(got -0.1\)"),
        ({"inner_lr": float("nan")}, r"inner_lr must be >= 0 and finite \(got nan\)"),
        (
            {"inner_lr": {"0.weight": 0.1}},
            r"inner_lr must name the adapted .* missing: \['0.bias'",
        ),
        ({"inner_lr": [0.1, 0.2]}, r"inner_lr must be a scalar, \[1\] or a mapping"),
        ({"inner_steps": -1}, r"steps must be >= 0 \(got -1\)"),
        ({"first_order": nn.ReLU()}, r"first_order must be True or False \(got ReLU\(\)\)"),
        ({"inner_steps": nn.ReLU()}, r"inner_steps must be no module or parameter, for the class has None"),
        ({"adapt": "neck.*"}, "adapt must name parameters of the model"),
        ({"batch_norm": "layer"}, "batch_norm must be one of"),
        (
            {"model": nn.Linear(2, 2), "batch_norm": "per_step"},
            r"needs a batch norm .* \(got none in Linear\)",
        ),
        ({"model": nn.Flatten()}, "model must have parameters to adapt"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, "adapt must leave a parameter that moves"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MAML(**{"model": model(), **options})


def test_a_refused_setting_leaves_the_model_alone() -> None:
    net = model()
    with pytest.raises(ValueError, match="momentum"):
        MAML(net, batch_norm="per_step", momentum=-1)
    assert all(value.requires_grad for value in net.parameters())


def test_bad_tasks() -> None:
    maml, batch = MAML(model(), 0.3), tasks()
    x, y, query_x, query_y = batch.support_x, batch.support_y, batch.query_x, batch.query_y
    with pytest.raises(ValueError, match=r"query_y must hold class ids 0..2 \(got [345]\)"):
        maml(TaskBatch(x, y, query_x, query_y + C))
    with pytest.raises(ValueError, match="support_x must have the dtype of the model's parameters"):
        maml(batch.to(torch.float32))
    with pytest.raises(ValueError, match=r"step_weights must have shape \(1,\) \(got \(2,\)\)"):
        maml(batch, step_weights=torch.ones(2).double())
    with pytest.raises(ValueError, match=r"steps must be >= 0 \(got -2\)"):
        maml(batch, steps=-2)
    with pytest.raises(ValueError, match="query_x must have as many tasks as support_x"):
        TaskBatch(x, y, query_x[:2], query_y[:2])


@backends
def test_a_nan_is_reported_with_task_and_step(backend: str) -> None:
    batch = tasks()
    batch.support_x[2, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="task 2, step 0"):
        MAML(model(), 0.3, backend=backend)(batch)


@pytest.mark.parametrize("backend", ["fused", "fallback"])
def test_support_samples_can_be_weighed(backend: str) -> None:
    maml, batch = MAML(model(), 0.3, 2, backend=backend), tasks()
    weight = torch.rand(batch.support_x.shape[:2], dtype=batch.support_x.dtype, requires_grad=True)
    out = maml(batch, sample_weight=weight)
    support = Support(batch.support_x, batch.support_y, weight)
    expected = reference.meta_loss(maml.problem(), support, Query(batch.query_x, batch.query_y))
    assert_gradients(out, expected, [weight, *maml.parameters()])
