"""MAML++ against its paper: each of the five changes, and MAML without them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from tests.building import backends, perceptron
from tests.exactness import assert_close, gradients, relative_error
from tests.learners.comparing import assert_exact, class_tasks

OFF = {"multi_step_loss": False, "rates_per_step": False, "norm_per_step": False, "cosine": False}
K = 3


def model():
    return perceptron(nn.BatchNorm1d(7), nn.Tanh())


def of_authors(epoch, steps, epochs):
    """`get_per_step_loss_importance_vector`, one weight at a time."""
    decay, least = 1 / steps / epochs, 0.03 / steps
    weights = [max(1 / steps - epoch * decay, least) for _ in range(steps - 1)]
    return [*weights, min(1 / steps + epoch * (steps - 1) * decay, 1 - (steps - 1) * least)]


@backends
@pytest.mark.parametrize("epoch", [0, 2, 9, 10])
def test_it_is_the_papers(epoch, backend):
    """Losses after each step, weighted; a rate for each tensor and step; affines for each step."""
    learner, batch = mf.MAMLpp(model(), 0.3, K, epoch_steps=7, backend=backend), class_tasks(4)
    learner.set_extra_state(7 * epoch + 3)
    with torch.no_grad():
        for value in (*learner.inner_lr.values(), *learner.per_step.values()):
            value += 0.1 * torch.rand_like(value)
    weights = of_authors(epoch, K, 10) if epoch < 10 else [0.0, 0.0, 1.0]

    def unbatched(x, y, query_x, query_y):
        theta = {name: value for name, value in learner.model.named_parameters() if not name.startswith("1.")}
        total = 0.0
        for step in range(K):
            norm = {f"1.{name}": learner.per_step[f"1/{name}"][step] for name in ("weight", "bias")}
            loss = F.cross_entropy(functional_call(learner.model, theta | norm, (x,)), y)
            found = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {
                name: value - learner.inner_lr[name.replace(".", "/")][step] * gradient
                for (name, value), gradient in zip(theta.items(), found, strict=True)
            }
            judged = F.cross_entropy(functional_call(learner.model, theta | norm, (query_x,)), query_y)
            total = total + weights[step] * judged
        return total

    assert_exact(learner, batch, unbatched)


@backends
def test_without_its_changes_it_is_maml(backend):
    net, batch = model(), class_tasks(4)
    learner, maml = mf.MAMLpp(net, 0.3, K, **OFF, backend=backend), mf.MAML(net, 0.3, K, backend=backend)
    parameters = dict(net.named_parameters())
    assert dict(learner.named_parameters()).keys() == dict(maml.named_parameters()).keys()
    out, expected = learner(batch), maml(batch)
    assert torch.equal(out.task_losses, expected.task_losses)
    assert_close(gradients(out.loss, parameters), gradients(expected.loss, parameters), 1e-14)
    twins = [copy.deepcopy(each) for each in (learner, maml)]
    for each in twins:
        optimizers = each.optimizers()
        for _ in range(3):
            each.meta_step(batch, optimizers)
    assert all(map(torch.equal, twins[0].parameters(), twins[1].parameters()))


def test_weights_sum_to_one():
    learner = mf.MAMLpp(model(), inner_steps=5)
    for epoch in range(10):
        weights = learner.step_weights(epoch)
        assert weights.tolist() == pytest.approx(of_authors(epoch, 5, 10))
        assert float(weights.sum()) == pytest.approx(1)
    assert learner.step_weights(10) is None


def test_the_first_epochs_are_of_first_order():
    net, batch = model(), class_tasks(4)
    learner = mf.MAMLpp(net, 0.3, K, **OFF, first_order_epochs=2, epoch_steps=5)
    parameters = dict(net.named_parameters())
    for done, first_order in ((0, True), (9, True), (10, False)):
        learner.set_extra_state(done)
        expected = mf.MAML(net, 0.3, K, first_order=first_order)(batch).loss
        assert_close(gradients(learner(batch).loss, parameters), gradients(expected, parameters), 1e-12)


def test_the_rate_falls_along_a_cosine_from_epoch_to_epoch():
    learner, batch = mf.MAMLpp(model(), epoch_steps=2, epochs=3), class_tasks(4)
    (optimizer,) = learner.optimizers(1e-3)
    twin = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(twin, 3, eta_min=1e-5)
    for _ in range(4):
        for _ in range(2):
            learner.meta_step(batch, [optimizer])
            wanted = twin.param_groups[0]["lr"] if learner.get_extra_state() <= 8 else 1e-5
            assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted)
        twin.step()
        schedule.step()


def test_evaluation_judges_the_last_step():
    learner, batch = mf.MAMLpp(model(), 0.3, K), class_tasks(4)
    training = learner(batch).loss
    assert relative_error(learner.eval()(batch).loss, training) > 1e-6
    assert relative_error(learner.by_step(batch)[-1].task_losses, learner(batch).task_losses) < 1e-12


def test_copies_and_states_go_on_counting():
    learner, batch = mf.MAMLpp(model(), epoch_steps=2), class_tasks(4)
    optimizers = learner.optimizers()
    for _ in range(5):
        learner.meta_step(batch, optimizers)
    other = mf.MAMLpp(model(), epoch_steps=2)
    other.load_state_dict(learner.state_dict())
    assert (learner.epoch, other.epoch, copy.deepcopy(learner).epoch) == (2, 2, 2)
    assert torch.equal(other(batch).loss, learner(batch).loss)


def test_it_keeps_the_contract():
    mf.check_learner(mf.MAMLpp(perceptron()), class_tasks(4))
    mf.check_learner(mf.MAMLpp(model()), class_tasks(4))
    assert mf.check_gradients(mf.MAMLpp(model(), inner_steps=3), class_tasks(4)).order == "second order"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cosine": 1}, TypeError, r"cosine must be True or False \(got 1\)"),
        (
            {"norm_per_step": True, "model": mf.models.mlp([4, 8, 3])},
            ValueError,
            "norm_per_step must be False, or None, for a model without batch norms",
        ),
        ({"first_order_epochs": -1}, ValueError, r"first_order_epochs must be >= 0 \(got -1\)"),
        ({"multi_step_epochs": 0}, ValueError, r"multi_step_epochs must be >= 1 \(got 0\)"),
        ({"epoch_steps": 0}, ValueError, r"epoch_steps must be >= 1 \(got 0\)"),
        ({"inner_lr": -0.1}, ValueError, r"inner_lr must be >= 0 and finite \(got -0.1\)"),
        ({"model": nn.Flatten()}, ValueError, "model must have parameters to adapt"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        mf.MAMLpp(**{"model": model(), **options})
