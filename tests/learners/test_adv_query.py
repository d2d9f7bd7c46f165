"""Adversarial Querying against its paper, around MAML and around others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.learners import AttackedQueries, attack_queries
from metaaug_fast.models import conv4, perceptron
from tests.exactness import gradients, relative_error
from tests.learners.attacking import climbed
from tests.learners.comparing import assert_exact, class_tasks, descended


class RobustProtoNet(AttackedQueries, mf.ProtoNet):
    """Nothing but the two."""


class RobustR2D2(AttackedQueries, mf.R2D2):
    """Nothing but the two."""


def model():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def encoder():
    return perceptron(None, (5,), (7, 6), "tanh").double()


def in_range(tasks):
    """The tasks with inputs between 0 and 1."""
    x, y, query_x, query_y = tasks.tensors
    return mf.TaskBatch(x.sigmoid(), y, query_x.sigmoid(), query_y)


@pytest.mark.parametrize(
    ("backend", "random_start"), [("fused", False), ("fused", True), ("fallback", False)]
)  # the fallback draws a number first
@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_the_papers(steps, random_start, backend):
    net = model()
    learner = mf.AdversarialQuerying(
        net, 0.3, 0.4, steps, attack_steps=4, random_start=random_start, low=0.0, high=1.0, learn_inner_lr=True,
        backend=backend,
    )  # fmt: skip
    batch = in_range(class_tasks(5))
    torch.manual_seed(7)
    starts = iter(2 * torch.rand_like(batch.query_x) - 1)

    def unbatched(x, y, query_x, query_y):
        parameters = dict(net.named_parameters())
        weights = descended(net, parameters, dict.fromkeys(parameters, learner.inner_lr), x, y, steps)
        fixed = {name: value.detach() for name, value in weights.items()}
        start = next(starts) if random_start else None
        attacked = climbed(
            lambda inputs: F.cross_entropy(functional_call(net, fixed, (inputs,)), query_y),
            query_x, 0.3, 4, 2.5 * 0.3 / 4, 0, 1, start,
        )  # fmt: skip
        return F.cross_entropy(functional_call(net, weights, (attacked,)), query_y)

    torch.manual_seed(7)
    assert_exact(learner, batch, unbatched)


def test_around_protonet_it_is_the_papers():
    learner = RobustProtoNet(encoder(), 0.3, attack_steps=3, attack_step=0.15, random_start=False)

    def unbatched(x, y, query_x, query_y):
        prototypes = torch.stack([learner.model(x[y == way]).mean(0) for way in range(3)])

        def loss(inputs, centres):
            distances = (learner.model(inputs).unsqueeze(1) - centres).square().sum(-1)
            return F.cross_entropy(-distances, query_y)

        attacked = climbed(lambda inputs: loss(inputs, prototypes.detach()), query_x, 0.3, 3, 0.15)
        return loss(attacked, prototypes)

    assert_exact(learner, class_tasks(5), unbatched)


@pytest.mark.parametrize(
    ("kind", "robust", "plain"),
    [
        (model, mf.AdversarialQuerying, mf.MAML),
        (encoder, RobustR2D2, mf.R2D2),
    ],
    ids=["maml", "r2d2"],
)
def test_without_a_radius_and_in_evaluation_it_is_the_learner_itself(kind, robust, plain):
    net, batch = kind(), class_tasks(5)
    named, wanted = dict(net.named_parameters()), plain(net).double()(batch)
    state = torch.get_rng_state()
    found = robust(net, radius=0.0).double()(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.task_losses, wanted.task_losses)
    for one, other in zip(gradients(found.loss, named).values(), gradients(wanted.loss, named).values(), strict=True):
        assert torch.equal(one, other)
    attacked = robust(net, radius=0.2).double()
    assert bool((attacked(batch).task_losses > wanted.task_losses).all())
    assert torch.equal(attacked.eval()(batch).task_losses, wanted.task_losses)


def test_gradients_are_exact_and_of_the_order_that_is_said():
    for first_order, order in ((False, "second order"), (True, "first order")):
        learner = mf.AdversarialQuerying(model(), 0.2, 0.3, 2, first_order=first_order)
        report = mf.check_gradients(learner, class_tasks(5))
        assert report.order == order
        assert report.relative_error < 1e-9


def test_running_statistics_see_no_attack():
    learner = RobustProtoNet(conv4(None, (1, 16, 16), hidden=3), attack_steps=3)
    learner(class_tasks(1, 16, 16).to(torch.float32))
    assert int(learner.model.block1[1].num_batches_tracked) == 1


def test_support_samples_can_be_weighed():
    learner, batch = mf.AdversarialQuerying(model(), 0.3, 0.4, 2, random_start=False), class_tasks(5)
    weight = torch.rand(3, 6).double()
    attacked = attack_queries(learner, batch, mf.PGD(0.3, 7, random_start=False), sample_weight=weight)
    expected = mf.MAML(learner.model, 0.4, 2)(attacked, sample_weight=weight)
    assert relative_error(learner(batch, sample_weight=weight).task_losses, expected.task_losses) < 1e-12


@pytest.mark.slow
def test_it_learns_to_withstand_attacks():
    """Where one large feature tells classes well, and many small ones together better: these do not withstand."""
    means = torch.cat([3 * torch.randn(40, 4), 0.3 * torch.randn(40, 40)], 1)
    labels = torch.arange(40).repeat_interleave(6)
    samples = means[labels] + 0.1 * torch.randn(len(labels), 44)
    episodes = mf.data.Episodes(mf.data.ClassSamples.from_arrays(samples, labels), ways=3, shots=1, queries=3, tasks=8)
    net = perceptron(3, (44,), (32,))
    plain, robust = mf.MAML(net), mf.AdversarialQuerying(perceptron(3, (44,), (32,)), radius=0.5, attack_steps=3)
    attack = mf.PGD(0.5, 10)
    for learner in (plain, robust):
        mf.train(learner, episodes, 100, progress=False)
    found = [mf.evaluate(learner, episodes, 200, attack=attack).mean for learner in (plain, robust)]
    assert found[1] > found[0] + 0.05, found


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"radius": -0.1}, ValueError, r"radius must be >= 0 \(got -0.1\)"),
        ({"attack_steps": 0}, ValueError, r"attack_steps must be >= 1 \(got 0\)"),
        ({"attack_step": -0.1}, ValueError, r"attack_step must be >= 0 \(got -0.1\)"),
        ({"random_start": None}, TypeError, r"random_start must be True or False \(got None\)"),
        ({"low": 1, "high": 0}, ValueError, r"low must be below high, 0 \(got 1\)"),
        ({"inner_lr": -1}, ValueError, r"inner_lr must be >= 0"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        mf.AdversarialQuerying(model(), **options)


def test_queries_outside_of_the_range_are_refused():
    learner = mf.AdversarialQuerying(model(), low=0.0, high=1.0)
    with pytest.raises(ValueError, match="inputs must lie between low and high, 0 and 1, to be attacked"):
        learner(class_tasks(5))
