"""Single ops, `make bench-ops`: one exact second-order meta-gradient of a net of them, here and looped in plain torch.

Times of an op without weights contain those of the 1x1 convolution before it.
"""

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast.bench.rivals import plain_loop
from metaaug_fast.bench.workloads import Workload

TASKS, SAMPLES, CHANNELS, RATE = 4, 5, 64, 0.01


def twice(make):
    """Two layers, so that the second has a gradient to pass on."""
    return nn.Sequential(make(), make(), nn.Flatten())


def after_1x1(*layers):
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), *layers, nn.Flatten())


CASES = {
    f"two 3x3 convolutions, stride {stride}, {pixels} px": (
        (CHANNELS, pixels, pixels),
        lambda stride=stride: twice(lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, stride, 1)),
    )
    for stride in (1, 2)
    for pixels in (28, 14, 7, 3)
}
CASES |= {
    "two linear layers, 784": ((784,), lambda: twice(lambda: nn.Linear(784, 784))),
    "two linear layers, 40": ((40,), lambda: twice(lambda: nn.Linear(40, 40))),
}
CASES |= {
    f"1x1 convolution and {name}, {pixels} px": ((CHANNELS, pixels, pixels), lambda layers=layers: after_1x1(*layers()))
    for name, layers in {
        "nothing": lambda: [],
        "max pool": lambda: [nn.MaxPool2d(2)],
        "batch norm, ReLU, max pool": lambda: [nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.MaxPool2d(2)],
        "group norm": lambda: [nn.GroupNorm(8, CHANNELS)],
    }.items()
    for pixels in (28, 14)
}


def ours(model, workload, tasks):
    learner = mf.MAML(model, RATE, workload.inner_steps, loss="mse", backend="fused")
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(learner(tasks).loss, parameters)


def plain(model, workload, tasks):
    return plain_loop(workload, model, tasks)


@pytest.mark.parametrize("executor", [ours, plain])
@pytest.mark.parametrize("case", CASES)
def test_meta_gradient(benchmark, case, executor):
    benchmark.group = case
    shape, make = CASES[case]
    torch.manual_seed(0)
    model = make()
    inputs = [torch.randn(TASKS, SAMPLES, *shape) for _ in range(2)]
    with torch.no_grad():
        targets = [torch.randn_like(model(x.flatten(0, 1))).unflatten(0, (TASKS, SAMPLES)) for x in inputs]
    tasks = mf.TaskBatch(inputs[0], targets[0], inputs[1], targets[1])
    workload = Workload(case, "", shape, TASKS, SAMPLES, SAMPLES, 1, RATE, ways=None)
    wanted = torch.cat([each.flatten() for each in plain(model, workload, tasks)()])
    found = torch.cat([each.flatten() for each in benchmark(executor(model, workload, tasks))])
    assert (found - wanted).norm() < 1e-3 * wanted.norm()
