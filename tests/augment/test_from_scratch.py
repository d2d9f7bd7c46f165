"""Networks that learn tasks from nothing, and what is learned through them, against an unroll of each task alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metaaug_fast.augment import AugmentationPolicy, FromScratch, random_starts
from tests.building import perceptron
from tests.exactness import relative_error
from tests.learners.comparing import class_tasks

pytestmark = pytest.mark.usefixtures("fresh_numbers")

STEPS = 3


def scratch(backend="auto", **options):
    return FromScratch(perceptron(), 0.3, STEPS, backend=backend, seed=5, **options)


def unrolled(learner, batch, starts):
    """Task by task, from its own weights."""
    names = [name for name, _ in learner.model.named_parameters()]
    sizes = [value.numel() for value in learner.model.parameters()]
    shapes = [value.shape for value in learner.model.parameters()]
    losses = []
    for start, x, y, query_x, query_y in zip(starts, *batch.tensors, strict=True):
        parts = [part.view(shape) for part, shape in zip(start.split(sizes), shapes, strict=True)]
        theta = {name: part.requires_grad_() for name, part in zip(names, parts, strict=True)}
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(learner.model, theta, (x,)), y)
            slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            moved = (value - learner.inner_lr * slope for value, slope in zip(theta.values(), slopes, strict=True))
            theta = dict(zip(names, moved, strict=True))
        losses.append(F.cross_entropy(functional_call(learner.model, theta, (query_x,)), query_y))
    return torch.stack(losses)


@pytest.mark.parametrize("backend", ["fused", "fallback"])
def test_losses_and_the_gradient_of_a_policy(backend):
    learner, batch = scratch(backend).eval(), class_tasks(4)
    policy = AugmentationPolicy(["noise", "scaling"], copies=2, originals=True).double()
    drawn = policy.draw(batch.support_x)
    losses = learner(policy(batch, drawn=drawn)).task_losses
    expected = unrolled(learner, policy(batch, drawn=drawn), random_starts(learner.model, batch.tasks, 5))
    assert relative_error(losses, expected) < 1e-9
    moved = list(policy.parameters())
    grads, wanted = (torch.autograd.grad(each.mean(), moved) for each in (losses, expected))
    assert all(bool(each) for each in wanted)
    assert relative_error(torch.stack(grads), torch.stack(wanted)) < 1e-8


@pytest.mark.parametrize("backend", ["fused", "fallback"])
def test_the_rate_learns_too(backend):
    learner, batch = scratch(backend, learn_inner_lr=True).eval(), class_tasks(4)
    (grad,) = torch.autograd.grad(learner(batch).loss, [learner.inner_lr])
    expected = unrolled(learner, batch, random_starts(learner.model, batch.tasks, 5)).mean()
    (wanted,) = torch.autograd.grad(expected, [learner.inner_lr])
    assert relative_error(grad, wanted) < 1e-8


def test_the_same_in_evaluation_and_anew_in_training():
    learner, batch = scratch(), class_tasks(4)
    torch.manual_seed(3)
    first = learner(batch).task_losses
    assert not torch.equal(learner(batch).task_losses, first)
    torch.manual_seed(3)
    assert torch.equal(learner(batch).task_losses, first)
    learner.eval()
    torch.manual_seed(3)
    judged = learner(batch).task_losses
    assert torch.equal(learner(batch).task_losses, judged)
    assert not torch.equal(judged, first)
    other = FromScratch(learner.model, 0.3, STEPS, seed=6).eval()
    assert not torch.equal(other(batch).task_losses, judged)
    adapted = learner.adapt(*batch.tensors[:2])
    torch.testing.assert_close(adapted.evaluate(batch.query_x, batch.query_y).task_losses, judged)


def test_its_own_weights_are_of_no_matter_and_stay():
    learner, batch = scratch().eval(), class_tasks(4)
    judged = learner(batch).task_losses
    before = [value.clone() for value in learner.model.parameters()]
    learner.meta_step(batch, learner.optimizers(0.1))
    assert all(torch.equal(*pair) for pair in zip(before, learner.model.parameters(), strict=True))
    with torch.no_grad():
        for value in learner.model.parameters():
            value.normal_()
    assert torch.equal(learner(batch).task_losses, judged)


def test_what_is_refused():
    with pytest.raises(TypeError, match="seed must be an integer"):
        FromScratch(perceptron(), seed=0.5)
    with pytest.raises(ValueError, match="inner_lr must be"):
        FromScratch(perceptron(), -1.0)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.factor * x

    with pytest.raises(ValueError, match=r"layers that draw their weights by reset_parameters\(\) \(got Scaled"):
        FromScratch(Scaled())
    with pytest.raises(ValueError, match="support_x must not require a gradient in first"):
        FromScratch(perceptron(), first_order=True)(AugmentationPolicy(["noise"]).double()(class_tasks(4)))
