"""A learner with its policy: losses and gradients against an unroll, a task at a time; the contract."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metaaug_fast as mf
from metaaug_fast.augment import AugmentationPolicy, Augmented
from metaaug_fast.tasks import TaskBatch
from tests.building import perceptron
from tests.exactness import assert_close, gradients, relative_error
from tests.learners.comparing import class_tasks, descended

pytestmark = pytest.mark.usefixtures("fresh_numbers")

FEATURES, RATE, STEPS = 4, 0.3, 2
MAKE = {
    "plain": lambda: AugmentationPolicy(["noise", "scaling"], 0.6, 0.4),
    "copies": lambda: AugmentationPolicy(["noise", "scaling", "dropout"], 0.6, 0.4, copies=2, originals=True),
    "mixed": lambda: AugmentationPolicy(["noise", "mixup"], 0.6, 0.4, ways=3),
    "score": lambda: AugmentationPolicy(["noise", "scaling"], 0.6, 0.4, choices="score", copies=2),
}


def learner_of(kind):
    maml = mf.MAML(perceptron(), inner_lr=RATE, inner_steps=STEPS, backend="fused")
    return Augmented(maml, MAKE[kind]().double())


def unrolled(learner, x, y, query_x, query_y):
    """One task's loss, as plain autograd."""
    model = learner.learner.model
    start = dict(model.named_parameters())
    weights = descended(model, start, dict.fromkeys(start, RATE), x, y, STEPS)
    return F.cross_entropy(functional_call(model, weights, (query_x,)), query_y)


def task_by_task(learner, batch, drawn):
    """The tasks' losses, each augmented on its own, and what the policy is to minimise."""
    policy, losses, chances = learner.policy, [], []
    for task in range(batch.tasks):
        own = {
            name: type(each)(*(None if value is None else value[task : task + 1] for value in each))
            for name, each in drawn.items()
        }
        made = policy(batch[task], drawn=own)
        losses.append(unrolled(learner, *(each[0] for each in made.tensors)))
        chances.append(policy._log_chance)
    losses = torch.stack(losses)
    if policy.choices == "relaxed":
        return losses, losses.mean()
    apart = losses.detach()
    others = torch.stack([(apart.sum() - own) / (len(apart) - 1) for own in apart])
    return losses, losses.mean() + ((apart - others) * torch.cat(chances)).mean()


@pytest.mark.parametrize("kind", MAKE)
def test_losses_and_gradients_in_training(kind):
    """Of the learner and of the policy, through the steps of the inner loop."""
    learner, batch = learner_of(kind), class_tasks(FEATURES)
    state = torch.get_rng_state()
    drawn = learner.policy.draw(batch.support_x)
    torch.set_rng_state(state)
    out = learner(batch)
    named = dict(learner.named_parameters())
    got = gradients(out.loss, named)
    losses, loss = task_by_task(learner, batch, drawn)
    assert relative_error(out.task_losses, losses) < 1e-10
    assert_close(got, gradients(loss, named))
    assert all(float(slope.norm()) > 0 for name, slope in got.items() if name.startswith("policy"))


@pytest.mark.parametrize("kind", MAKE)
def test_evaluation_is_the_same_for_every_sample(kind):
    """A task's support set is augmented by one set of numbers a copy, and mixed with nothing."""
    learner, batch = learner_of(kind).eval(), class_tasks(FEATURES)
    state = torch.get_rng_state()
    out = learner(batch)
    assert torch.equal(learner(batch).task_losses, out.task_losses)
    assert torch.equal(torch.get_rng_state(), state)
    policy = learner.policy
    one = policy.draw(batch.support_x[:1, :1], torch.Generator().manual_seed(0))
    count = batch.support_x.shape[1]
    parts = []
    for sample in range(count):  # each on its own, by the same numbers
        x = batch.support_x[:, sample : sample + 1]
        for_all = {
            name: type(each)(*(None if value is None else value.expand(len(x), *value.shape[1:]) for value in each[:3]))
            for name, each in one.items()
        }
        alone = {
            name: each._replace(
                partner=None if one[name].partner is None else torch.arange(policy.copies).expand(3, -1)
            )
            for name, each in for_all.items()
        }
        parts.append(policy.augment(x, batch.support_y[:, sample : sample + 1], drawn=alone)[0])
    made, _ = policy.augment(*batch.tensors[:2], drawn=learner._drawn(batch.support_x))
    rounds = policy.copies + policy.originals
    expected = torch.stack(parts, 2).flatten(1, 2)  # a copy's samples together
    assert made.shape[1] == rounds * count
    assert relative_error(made, expected) < 1e-12
    assert (
        relative_error(out.task_losses, learner.adapt(*batch.tensors[:2]).evaluate(*batch.tensors[2:]).task_losses)
        < 1e-12
    )


@pytest.mark.parametrize("kind", MAKE)
def test_it_keeps_the_contract(kind):
    report = mf.check_learner(learner_of(kind), class_tasks(FEATURES))
    assert {clause for clause in report.clauses.values() if clause != "kept"} == set()
    assert mf.check_gradients(learner_of(kind).eval(), class_tasks(FEATURES)).ok


def test_around_a_learner_that_compares_features():
    learner = Augmented(mf.ProtoNet(nn.Linear(FEATURES, 3).double()), MAKE["copies"]().double())
    report = mf.check_learner(learner, class_tasks(FEATURES))
    assert {clause for clause in report.clauses.values() if clause != "kept"} == set()
    learner(class_tasks(FEATURES)).loss.backward()
    assert all(value.grad is not None for value in learner.policy.parameters())


def test_training_learns_what_helps():
    """Classes are directions, whatever the length: support sets of several lengths teach that, noise does not."""
    torch.manual_seed(0)
    policy = AugmentationPolicy(["noise", "scaling"], 0.5, 0.5, copies=4)
    learner = Augmented(mf.ProtoNet(nn.Linear(8, 8)), policy)
    labels = torch.arange(40).repeat_interleave(12)
    x = 0.3 * torch.randn(40, 8)[labels] + 0.02 * torch.randn(480, 8)
    data = mf.data.ClassSamples.from_arrays(x, labels)
    episodes = mf.data.Episodes(data, ways=4, shots=1, queries=5, tasks=8)
    before = policy.as_dict()["noise"]
    history = mf.train(learner, episodes, 60, progress=False)
    assert history.training[-1].step == 60
    chance, strength = policy.as_dict()["noise"]
    assert chance * strength < before[0] * before[1]


def test_more_is_the_policys():
    learner = learner_of("copies")
    x, y = torch.randn(4, FEATURES).double(), torch.tensor([0, 1, 1, 0])
    one = learner.more(x, y, 3, torch.Generator().manual_seed(5))
    other = learner.policy.more(x, y, 3, torch.Generator().manual_seed(5))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_it_is_copied_with_its_state():
    learner = learner_of("copies")
    learner.meta_step(class_tasks(FEATURES), learner.optimizers())
    other = learner_of("copies")
    other.load_state_dict(copy.deepcopy(learner).state_dict())
    batch = class_tasks(FEATURES)
    assert torch.equal(learner.eval()(batch).task_losses, other.eval()(batch).task_losses)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"learner": nn.Linear(4, 3)}, TypeError, r"learner must be a Learner \(got Linear\)"),
        ({"learner": mf.Reptile(perceptron())}, TypeError, r"learner must take plain meta-steps \(got Reptile"),
        ({"learner": mf.MAML(perceptron(), first_order=True)}, ValueError, "learner must be of second order"),
        ({"policy": nn.Linear(4, 3)}, TypeError, r"policy must be an AugmentationPolicy \(got Linear\)"),
        ({"seed": 0.5}, TypeError, r"seed must be an integer \(got 0.5\)"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        Augmented(**{"learner": mf.MAML(perceptron()), "policy": MAKE["plain"](), **options})


def test_bad_tasks():
    batch = class_tasks(FEATURES)
    learner = Augmented(mf.MAML(perceptron()), AugmentationPolicy(["rotation"]).double())
    with pytest.raises(ValueError, match="support_x must"):
        learner(batch)
    with pytest.raises(TypeError, match="tasks must"):
        learner(None)
    with pytest.raises(ValueError, match="steps must"):
        learner_of("plain")(TaskBatch(*batch.tensors), steps=-1)
