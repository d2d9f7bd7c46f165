"""ADML against its paper."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from tests.building import backends
from tests.exactness import assert_close, gradients, relative_error
from tests.learners.attacking import climbed
from tests.learners.comparing import assert_exact, class_tasks, descended


def model():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


@backends
@pytest.mark.parametrize(("steps", "attack_steps"), [(1, 1), (3, 2)])
def test_it_is_the_papers(steps, attack_steps, backend):
    """Both arms, crossed, each task on its own."""
    net = model()
    learner = mf.ADML(net, 0.3, 0.4, steps, attack_steps, low=-3.0, high=3.0, learn_inner_lr=True, backend=backend)
    clamped = [each.clamp(-3, 3) if each.is_floating_point() else each for each in class_tasks(5).tensors]
    step = min(0.3, 2.5 * 0.3 / attack_steps)

    def unbatched(x, y, query_x, query_y):
        parameters = dict(net.named_parameters())

        def loss(weights, inputs, targets):
            return F.cross_entropy(functional_call(net, weights, (inputs,)), targets)

        def attacked(weights, inputs, targets):
            fixed = {name: value.detach() for name, value in weights.items()}
            return climbed(lambda each: loss(fixed, each, targets), inputs, 0.3, attack_steps, step, -3, 3)

        def adapted(inputs):
            return descended(net, parameters, dict.fromkeys(parameters, learner.inner_lr), inputs, y, steps)

        clean, adversarial = adapted(x), adapted(attacked(parameters, x, y))
        return (loss(adversarial, query_x, query_y) + loss(clean, attacked(clean, query_x, query_y), query_y)) / 2

    assert_exact(learner, mf.TaskBatch(*clamped), unbatched)


def test_without_a_radius_both_arms_are_mamls():
    net, batch = model(), class_tasks(5)
    found, expected = mf.ADML(net, 0.0, 0.3, 2)(batch), mf.MAML(net, 0.3, 2)(batch)
    assert relative_error(found.task_losses, expected.task_losses) < 1e-12
    assert relative_error(found.loss, expected.loss) < 1e-12
    assert torch.equal(found.accuracy, expected.accuracy)
    named = dict(net.named_parameters())
    assert_close(gradients(found.loss, named), gradients(expected.loss, named), 1e-12)


def test_the_loss_is_the_mean_of_the_tasks_and_differs_from_mamls():
    net, batch = model(), class_tasks(5)
    found, clean = mf.ADML(net, 0.3)(batch), mf.MAML(net)(batch)
    assert relative_error(found.loss, found.task_losses.mean()) < 1e-12
    assert found.task_losses.shape == found.accuracy.shape == (3,)
    assert bool((found.task_losses > clean.task_losses).all())
    named = dict(net.named_parameters())
    by_tasks = gradients(mf.ADML(net, 0.3)(batch).task_losses.mean(), named)
    assert_close(by_tasks, gradients(found.loss, named), 1e-12)


def test_in_evaluation_it_is_maml():
    net, batch = model(), class_tasks(5)
    learner, maml = mf.ADML(net, 0.3, 0.4, 2).eval(), mf.MAML(net, 0.4, 2)
    assert torch.equal(learner(batch).task_losses, maml(batch).task_losses)
    adapted, expected = (each.adapt(*batch.tensors[:2]) for each in (learner, maml))
    assert torch.equal(adapted.flat, expected.flat)


def test_support_samples_can_be_weighed_and_steps_too():
    """A sample of weight 0 might as well be any other: it has no part in what is learned."""
    learner, batch = mf.ADML(model(), 0.3, 0.4, 2), class_tasks(5)
    weight = torch.rand(3, 6).double()
    weight[:, 0] = 0
    x = batch.support_x.clone()
    x[:, 0] += 1
    other = mf.TaskBatch(x, *batch.tensors[1:])
    options = {"sample_weight": weight, "step_weights": torch.tensor([0.25, 0.75]).double()}
    assert relative_error(learner(batch, **options).task_losses, learner(other, **options).task_losses) < 1e-12
    assert relative_error(learner(batch, **options).task_losses, learner(batch).task_losses) > 1e-3


def test_gradients_are_exact_and_of_the_order_that_is_said():
    for first_order, order in ((False, "second order"), (True, "first order")):
        report = mf.check_gradients(mf.ADML(model(), 0.2, 0.3, 2, first_order=first_order), class_tasks(5))
        assert report.order == order
        assert report.relative_error < 1e-9


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"radius": -0.1}, ValueError, r"radius must be >= 0 \(got -0.1\)"),
        ({"attack_steps": 1.5}, TypeError, r"attack_steps must be an integer \(got 1.5\)"),
        ({"attack_step": "x"}, TypeError, r"attack_step must be a number \(got 'x'\)"),
        ({"inner_steps": -1}, ValueError, r"inner_steps must be >= 0 \(got -1\)"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        mf.ADML(model(), **options)


def test_inputs_outside_of_the_range_are_refused():
    with pytest.raises(ValueError, match="inputs must lie between low and high, 0 and 1, to be attacked"):
        mf.ADML(model(), low=0.0, high=1.0)(class_tasks(5))
