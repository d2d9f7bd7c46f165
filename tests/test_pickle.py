"""Models, tasks and learners pickled and copied: into another process and back, they give what they gave here."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from tests.building import perceptron, tasks

# Reads a learner and tasks, and writes what the learner makes of them, and the learner.
ELSEWHERE = """
import pickle, sys, torch
torch.set_num_threads(1)
learner, tasks = pickle.load(sys.stdin.buffer)
found = [learner(tasks).task_losses.detach(), learner.adapt(tasks.support_x, tasks.support_y).flat.detach()]
sys.stdout.buffer.write(pickle.dumps((learner, tasks, found)))
"""

LEARNERS = {
    "maml": lambda model: mf.MAML(model, [0.3, 0.2], 2, learn_inner_lr=True, batch_norm="per_step"),
    "maml in the fallback": lambda model: mf.MAML(model, 0.3, 2, first_order=True, backend="fallback"),
    "reptile": lambda model: mf.Reptile(model, 0.1, 3, inner_batch=4, seed=7),
}


def draw():
    return perceptron(nn.BatchNorm1d(7), nn.Tanh()), tasks()


def results(learner, tasks):
    """What the learner makes of the tasks, then what a step changes in it."""
    found = [learner(tasks).task_losses.detach(), learner.adapt(tasks.support_x, tasks.support_y).flat.detach()]
    if isinstance(learner, mf.Reptile):
        learner.step(tasks)
    else:
        learner.zero_grad()
        learner(tasks).loss.backward()
        found += [value.grad for value in learner.parameters() if value.requires_grad]
    return found + [value.detach().clone() for value in learner.state_dict().values() if value.dtype.is_floating_point]


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("warm", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
def test_a_copy_gives_the_same_and_is_its_own(copied, warm, name):
    model, tasks = draw()
    learner = LEARNERS[name](model)
    if warm:
        results(learner, tasks)
    twin, same_tasks = copied((learner, tasks))
    before = copy.deepcopy(twin.state_dict())
    expected = results(learner, tasks)
    assert all(torch.equal(before[key], value) for key, value in twin.state_dict().items())
    assert_same(results(twin, same_tasks), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maml", "reptile"])
def test_into_another_process_and_back(name):
    model, tasks = draw()
    learner = LEARNERS[name](model)
    sent = pickle.dumps((learner, tasks))
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], input=sent, capture_output=True, check=True)
    back, same_tasks, found = pickle.loads(done.stdout)
    assert_same(found, results(learner, tasks)[:2])
    fresh = pickle.loads(sent)[0]
    assert_same(results(back, same_tasks), results(fresh, tasks))


@pytest.mark.parametrize("name", ["mlp", "omniglot_mlp", "conv4", "strided_conv4", "resnet12"])
def test_models(name):
    model = mf.models.mlp([784, 8, 5]) if name == "mlp" else getattr(mf.models, name)(ways=5)
    x = {"mlp": torch.randn(2, 784), "resnet12": torch.randn(2, 3, 84, 84)}.get(name, torch.randn(2, 1, 28, 28))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))
