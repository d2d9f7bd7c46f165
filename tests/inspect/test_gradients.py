"""`check_gradients` finds out which order was computed, and finds wrong gradients."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from metaaug_fast.inspect.gradients import check_gradients
from metaaug_fast.learners.maml import MAML
from metaaug_fast.learners.reptile import Reptile
from metaaug_fast.tasks import MetaOutput, TaskBatch
from tests import building
from tests.building import C, S, T, backends, perceptron


def model(*middle: nn.Module) -> nn.Sequential:
    return perceptron(*middle).float()


def tasks(soft: bool = False) -> TaskBatch:
    return building.tasks(soft).to(torch.float32)


@backends
@pytest.mark.parametrize(
    ("net", "options"),
    [
        (model(), {}),
        (model(nn.BatchNorm1d(7), nn.ReLU()), {"inner_steps": 3, "batch_norm": "per_step"}),
        (model(nn.Tanh(), nn.Dropout(0.3)), {"inner_steps": 2, "momentum": 0.5}),
        (model(), {"inner_lr": [0.3, 0.2], "inner_steps": 2, "learn_inner_lr": True, "weight_decay": 0.1}),
    ],
    ids=["plain", "per step", "dropout", "rates"],
)
@pytest.mark.parametrize("first_order", [False, True])
def test_the_order_is_found(first_order: bool, net: nn.Module, options: dict[str, Any], backend: str) -> None:
    maml = MAML(copy.deepcopy(net), **{"inner_lr": 0.3, **options}, first_order=first_order, backend=backend)
    report = check_gradients(maml, tasks())
    assert report.order == ("first order" if first_order else "second order"), report
    assert report.ok
    assert report.relative_error < 1e-9
    assert report.executor == backend
    assert ("inner_lr" in report.errors) == maml.problem().rates["0.weight"].value.requires_grad
    for group, error in report.errors.items():
        assert (error.differences < 1e-6) == (not first_order), group
        assert max(error.first_order, error.second_order) > 1e-6, group
    assert str(report).startswith(report.order)
    head, *rows = str(report).splitlines()[1:]
    assert head.split("  ")[-3:] == ["second order", "first order", "differences"]
    assert [row.split()[0] for row in rows] == list(report.errors)
    assert {len(line) for line in (head, *rows)} == {len(head)}  # numbers end under the end of their column's name


@backends
def test_soft_labels_and_step_weights(backend: str) -> None:
    report = check_gradients(MAML(model(), 0.3, 2, backend=backend), tasks(soft=True), torch.tensor([0.3, 0.7]))
    assert report.order == "second order", report
    assert set(report.errors) == {"parameters", "support_x", "support_y"}


@backends
def test_kinks_do_not_mislead(backend: str) -> None:
    layers = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 49, C)]
    x, y = torch.randn(2, T, S, 1, 16, 16), torch.randint(C, (2, T, S))
    report = check_gradients(MAML(nn.Sequential(*layers), 0.3, backend=backend), TaskBatch(x[0], y[0], x[1], y[1]))
    assert report.order == "second order", report


def test_without_steps_both_orders_are_the_same() -> None:
    report = check_gradients(MAML(model(), 0.3, 0, backend="fallback"), tasks())
    assert report.order == "second order"
    assert report.errors["parameters"].first_order < 1e-12
    assert report.errors["support_x"].second_order == report.errors["support_x"].differences == 0


class Scaled(MAML):
    """Its gradients are 0.1 % too long."""

    def forward(self, tasks: TaskBatch, **options: Any) -> MetaOutput:
        out = super().forward(tasks, **options)
        if out.loss.requires_grad:
            out.loss.register_hook(lambda gradient: 1.001 * gradient)
        return out


class Shifted(MAML):
    """Its loss is another than what its gradients belong to."""

    def forward(self, tasks: TaskBatch, **options: Any) -> MetaOutput:
        out = super().forward(tasks, **options)
        penalty = sum(value.detach().square().sum() for value in self.model.parameters())
        return MetaOutput(out.loss + penalty, out.task_losses)


class Mislabelled(MAML):
    """It computes first order and says second."""

    def forward(self, tasks: TaskBatch, **options: Any) -> MetaOutput:
        self.first_order = True
        out = super().forward(tasks, **options)
        self.first_order = False
        return out


@pytest.mark.parametrize("first_order", [False, True])
def test_wrong_gradients_are_of_neither_order(first_order: bool) -> None:
    report = check_gradients(Scaled(model(), 0.3, first_order=first_order, backend="fallback"), tasks())
    assert report.order.startswith("neither: ")
    assert not report.ok
    assert first_order or report.relative_error == pytest.approx(1e-3, rel=0.01)


def test_gradients_of_another_loss_are_of_neither_order() -> None:
    report = check_gradients(Shifted(model(), 0.3, backend="fallback"), tasks())
    assert report.order.startswith("neither: parameters agrees with the reference but is")
    assert not report.ok
    assert report.relative_error < 1e-9


def test_a_learner_that_says_the_wrong_order_is_not_ok() -> None:
    report = check_gradients(Mislabelled(model(), 0.3, backend="fallback"), tasks())
    assert report.order == "first order"
    assert not report.ok
    assert "(the learner says second order)" in str(report)


@backends
def test_nothing_is_disturbed(backend: str) -> None:
    maml, batch = MAML(model(nn.BatchNorm1d(7), nn.Dropout(0.5)), 0.3, batch_norm="running", backend=backend), tasks()
    maml(batch).loss.backward()
    before = copy.deepcopy(maml.state_dict())
    gradients = [value.grad.clone() for value in maml.parameters()]
    state = torch.get_rng_state()
    check_gradients(maml, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in maml.state_dict().items())
    assert all(value.dtype == torch.float32 for value in maml.parameters())
    assert all(torch.equal(value.grad, each) for value, each in zip(maml.parameters(), gradients, strict=True))
    assert not batch.support_x.requires_grad


def test_a_learner_without_meta_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learner must have a loss that can be differentiated \(got Reptile\)"):
        check_gradients(Reptile(model(), backend="fallback"), tasks())
