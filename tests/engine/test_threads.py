"""First calls from many threads at once, in fresh processes: later ones find what the first have left."""

import textwrap

import pytest

from tests.building import python

START = """
    import random, sys, threading, warnings
    import torch, metaaug_fast as mf
    from torch import nn

    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    calls, patched = (nn.Module.__call__, nn.Module.__getattr__), torch.is_tensor

    class Sorted(nn.Module):
        def forward(self, x):
            return torch.sort(x, dim=1).values if torch.is_tensor(x) and len(x) else x

    def net(width, *more):
        return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), *more, nn.Linear(width, 3)).double()

    def together(*functions):
        errors, barrier = [], threading.Barrier(len(functions))

        def run(function):
            barrier.wait()
            try:
                function()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(function,)) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        assert calls == (nn.Module.__call__, nn.Module.__getattr__) and patched is torch.is_tensor
        nn.Linear(2, 2)(torch.zeros(1, 2))

    x, y, query = torch.randn(2, 6, 4).double(), torch.randint(3, (2, 6)), torch.randn(2, 5, 4).double()
    results = {}

    def learn(name, model, **options):
        fast = mf.inner_loop(model, x, y, lr=0.1, steps=2, **options)
        fast(query).square().sum().backward()
        results[name] = [fast.flat.detach(), *(value.grad for value in model.parameters())]

    done = threading.Event()

    def first_calls():
        try:
            for name, model in models.items():
                learn(name, model, backend="fused")
        finally:
            done.set()
"""

END = """
    from metaaug_fast import reference
    from metaaug_fast.engine.problem import Support, inner_problem

    for name, (got, *gradients) in results.items():
        model = models[name]
        problem = inner_problem(model, 0.1, 2)
        expected = reference.adapt(problem, Support(x, y))
        assert (got - expected).norm() < 1e-12 * expected.norm(), name
        theta = reference.unpack(problem, expected)
        outputs = [
            torch.func.functional_call(model, {key: value[task] for key, value in theta.items()}, (query[task],))
            for task in range(2)
        ]
        wanted = torch.autograd.grad(torch.stack(outputs).square().sum(), model.parameters())
        one, other = (torch.cat([each.flatten() for each in values]) for values in (gradients, wanted))
        assert (one - other).norm() < 1e-9 * other.norm(), name
    print(len(results), "right")
"""

CASES = {
    # Different models, of which none has been seen before.
    "models": """
    models = {width: net(width) for width in range(3, 11)}
    together(*(lambda name=name, model=model: learn(name, model, backend="fused") for name, model in models.items()))
    """,
    # The same model, which one thread has to look at.
    "one model": """
    models = dict.fromkeys(range(6), net(7))
    fast = {}

    def only_adapt(name):
        fast[name] = mf.inner_loop(models[name], x, y, lr=0.1, steps=2, backend="fused").flat.detach()

    together(*(lambda name=name: only_adapt(name) for name in models))
    assert all(torch.equal(fast[0], each) for each in fast.values())
    learn(0, models[0], backend="fused")
    """,
    # Models that run in the fallback, where a module's tensors are replaced for a call.
    "fallback": """
    shared = net(5, Sorted())
    models = {width: net(width, Sorted()) for width in range(3, 6)} | dict.fromkeys((10, 11, 12), shared)
    fast = {}

    def only_adapt(name):
        for _ in range(5):
            fast[name] = mf.inner_loop(models[name], x, y, lr=0.1, steps=2, backend="fallback").flat.detach()

    together(*(lambda name=name: only_adapt(name) for name in models))
    assert torch.equal(fast[10], fast[11]) and torch.equal(fast[10], fast[12])
    for name in (3, 4, 5, 10):
        learn(name, models[name], backend="fallback")
        assert torch.equal(results[name][0], fast[name])
    """,
    # Threads beside it that know nothing of this package: they call and build modules, and draw random numbers.
    "bystanders": """
    models = {width: net(width) for width in range(3, 9)}

    def modules():
        while not done.is_set():
            model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1)))
            out = model(torch.ones(2, 3))
            assert type(out) is torch.Tensor and type(model[0].weight) is nn.Parameter, type(out)
            out.sum().backward()

    def draw():
        while not done.is_set():
            torch.randn(3)

    together(first_calls, modules, modules, draw)
    """,
    # Numbers drawn by another thread now and then are not taken for the model's.
    "random": """
    models = {width: net(width) for width in range(3, 9)}

    def draw():
        while not done.wait(0.02):
            random.random(), torch.rand(1)

    together(first_calls, draw)
    """,
}


@pytest.mark.parametrize("case", CASES)
def test_first_calls_from_many_threads(case):
    program = "".join(textwrap.dedent(part) for part in (START, CASES[case], END))
    assert python(program, timeout=300).endswith("right\n")
