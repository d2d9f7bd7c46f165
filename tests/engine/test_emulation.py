"""The GPU engine's device code in the host emulation (tests/native/emulation.h), by the tests of the CPU engine.

Every test of those modules that runs the engine is collected here too, with an extension whose every call goes through
the device code, but those that say why they are the CPU's alone. conftest.py takes a sample of them.
"""

import inspect
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils import cpp_extension

import metaaug_fast as mf
from metaaug_fast.data import ClassSamples, EpisodeSpec, samples
from metaaug_fast.data.draws import Draws
from metaaug_fast.engine import fused
from metaaug_fast.engine.problem import inner_problem
from metaaug_fast.errors import FallbackWarning, NotFusedError
from tests.builds import NATIVE, ROOT, folder_of
from tests.engine import test_fused, test_loop, test_ops
from tests.engine.test_fused import (
    Draw,
    asked_for,  # noqa: F401
    cast,
    conv_sets,
    convolutional,
    executor_of,
    mlp,
    perceptron_sets,
    run_all,
)
from tests.exactness import assert_close, errors
from tests.inspect import test_gradients
from tests.learners import test_maml, test_reptile

ROUNDOFF = {"tf32": 2.0**-11, "bf16": 2.0**-9}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_numbers", "emulation")]


def adopted() -> dict[str, object]:
    """All tests of the modules about it, and of the others those that take a backend; by module and name."""
    found = {}
    for module in (test_fused, test_ops, test_loop, test_maml, test_reptile, test_gradients):
        prefix = module.__name__.rpartition(".")[2]
        for name, value in vars(module).items():
            about_it = module in (test_fused, test_ops)
            if name.startswith("test_") and (about_it or "backend" in inspect.signature(value).parameters):
                found[prefix + name.removeprefix("test")] = value
    return found


globals().update(adopted())


@pytest.fixture(scope="module")
def extension():
    """The extension with the emulation in the CPU engine's place."""
    sources = [
        ROOT / "csrc" / name for name in ("ops.cpp", "bindings.cpp", "call.cpp", "flow.cpp", "fuse.cpp", "cpu/pool.cpp")
    ]
    sources += [NATIVE / "emulated.cpp", NATIVE / "emulation.cpp"]
    with folder_of("emulation", torch.__version__) as folder:  # ninja has been seen to miss a changed header
        return cpp_extension.load(
            "_C",
            [str(source) for source in sources],
            extra_cflags=["-O1", "-g1", "-fvisibility=hidden", "-DMETAAUG_EMULATION"],
            extra_include_paths=[str(ROOT / "csrc"), str(NATIVE)],
            build_directory=str(folder),
        )


# Too little shared memory for any task, enough for small ones, or for all.
@pytest.fixture(params=[1 << 10, 9000, 200_000], ids="shared={}".format)
def emulation(request, extension, monkeypatch):
    if mark := request.node.get_closest_marker("cpu_only"):
        pytest.skip(f"the CPU's alone: {mark.args[0]}")
    assert extension.instruction_set() == "emulation"
    monkeypatch.setattr(fused, "_C", extension)
    monkeypatch.setenv("METAAUG_SHARED_BYTES", str(request.param))
    if request.param == 9000:  # a step's activations are kept, and a task's gradient
        monkeypatch.setenv("METAAUG_KEEP_MIB", "0")
    return request.param


def test_the_way_that_a_shape_takes_is_told(emulation):
    problem = inner_problem(mlp(), 0.1, 1)
    executor = executor_of(problem, torch.zeros(1, 1, 4))
    small, large = executor.gpu_path(problem, 6), executor.gpu_path(problem, 5000)
    assert ("all in shared memory" in small) == (emulation == 200_000)
    assert "6 support and query samples" in small
    assert f"more than the {emulation / 1024:.1f} KiB of shared memory that a block has" in large


def test_models_with_too_many_parts_take_the_fallback():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(49)))
    model.requires_grad_(False)[0].requires_grad_(True)
    x, y = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    with pytest.raises(NotFusedError, match=r"takes at most 96 parameter tensors \(got 98\)"):
        mf.inner_loop(model, x, y, loss="mse", backend="fused")
    with pytest.warns(FallbackWarning, match="at most 96 parameter tensors"):
        mf.inner_loop(model, x, y, loss="mse")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("kind", ["perceptron", "convolutional"])
def test_tensor_cores(kind, precision, emulation):
    """Factors are rounded, nothing else is; and float32 is float32."""
    steps = 2
    model, sets = (mlp(), perceptron_sets()) if kind == "perceptron" else (convolutional(width=21), conv_sets())
    single = cast(torch.float32, inner_problem(model, 0.1, steps), *sets)
    expected = run_all(*cast(torch.float64, *single))
    exact, got = (
        {name: value.double() for name, value in run_all(replace(single[0], precision=each), *single[1:]).items()}
        for each in ("float32", precision)
    )
    assert_close(exact, expected, 200 * (steps + 1) * torch.finfo(torch.float32).eps)
    if emulation < 200_000:
        assert_close(got, expected, 12 * (steps + 1) * ROUNDOFF[precision])
        assert max(errors(got, expected).values()) > ROUNDOFF[precision] / 4
    elif kind == "perceptron":  # in shared memory, where no products go through tiles
        assert all(torch.equal(got[name], exact[name]) for name in exact)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("case", range(5))
def test_tensor_cores_multiply_small_integers_exactly(case, precision):
    """A convolution and its gradients, of sizes that fill tiles or do not."""
    draw = Draw()
    channels, outputs, size, count = draw.randint(1, 20), draw.randint(1, 40), draw.randint(3, 7), draw.randint(1, 5)
    kernel, stride = draw.choice((1, 2, 3)), draw.choice((1, 1, 2))
    model = nn.Conv2d(channels, outputs, kernel, stride, padding=draw.randint(0, 1), dtype=torch.float32)
    problem = inner_problem(model, 0.1, 0)
    tasks = draw.choice((1, 2, 7))
    flat = torch.randint(-2, 3, (tasks, sum(value.numel() for value in model.parameters()))).float().requires_grad_()
    x = torch.randint(-2, 3, (tasks, count, channels, size, size)).float().requires_grad_()
    executor, results = executor_of(problem, x), []
    for each in ("float32", precision):
        got = executor.predict(replace(problem, precision=each), flat, x)
        share = torch.arange(got.numel()).view_as(got) % 5 - 2.0
        results.append([got, *torch.autograd.grad(got, (flat, x), share)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.uint8, torch.float32, torch.float64])
def test_episodes_drawn_by_a_kernel_are_those_of_the_cpu(dtype, stored, extension, monkeypatch):
    monkeypatch.setattr(samples, "_C", extension)
    labels = torch.cat([torch.arange(9).repeat(3), torch.randint(9, (123,))])  # 3 of each class at least
    pictures = torch.randint(256, (150, 2, 3, 5)).to(stored)
    dataset = ClassSamples.from_arrays(pictures, labels)
    smallest = int(dataset.counts.sum(1).min())
    most = min(len(dataset), (1 << 10) // 8 // (1 + smallest))  # for which the least shared memory is enough
    spec = EpisodeSpec(int(torch.randint(1, most + 1, ())), 1, smallest - 1, dtype=dtype)
    seed = int(torch.randint(2**62, ()))
    for batch in (0, 3):
        expected = dataset.sampler(spec)(Draws(seed, batch, 4))
        got = dataset._device_sampler(spec)(Draws(seed, batch, 4))
        for name in ("support_x", "support_y", "query_x", "query_y"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
