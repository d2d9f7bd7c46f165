"""The CUDA engine on a GPU against the specification in float64, for `make test-gpu`; skipped where there is none."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

import metaaug_fast as mf
from metaaug_fast import _C
from metaaug_fast.data import ClassSamples
from metaaug_fast.engine import reference
from metaaug_fast.engine.problem import Query, Support, inner_problem
from metaaug_fast.errors import NonFiniteError
from tests.engine.test_fused import (
    cast,
    conv_sets,
    convolutional,
    executor_of,
    mlp,
    perceptron_sets,
    random_problem,
    run_all,
)
from tests.exactness import assert_close, errors, gradients, leaves

pytestmark = [
    pytest.mark.usefixtures("fresh_numbers", "poisoned"),
    pytest.mark.skipif(not (torch.cuda.is_available() and _C.cuda), reason="no GPU, or a build without CUDA"),
]
CASES = int(os.environ.get("METAAUG_GPU_CASES", "48"))


# Too little shared memory for any task, so that teams of blocks go through global memory; enough for small ones; or
# what there is.
@pytest.fixture(params=[1 << 10, 20_000, None], ids="shared={}".format)
def shared_bytes(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setenv("METAAUG_SHARED_BYTES", str(request.param))


@pytest.fixture
def poisoned():
    """Memory that torch gives out again, full of NaN."""
    for size in (2**12, 2**16, 2**20, 2**26):
        torch.full((size,), torch.nan, device="cuda")
    yield
    torch.cuda.synchronize()


def on_gpu(problem, support, query, dtype=torch.float64):
    return cast(dtype, problem, support, query, device="cuda")


@pytest.mark.parametrize("case", range(CASES))
def test_random_networks(case, shared_bytes):
    """Losses, accuracy, adapted weights and every gradient."""
    on_cpu = random_problem(case)
    expected, inputs = reference.meta_loss(*on_cpu), leaves(*on_cpu)
    moved = on_gpu(*on_cpu)
    executor = executor_of(moved[0], moved[1].x)
    assert executor.name == "fused"
    got, moved_inputs = executor.meta_loss(*moved), leaves(*moved)
    torch.testing.assert_close(got.task_losses.cpu(), expected.task_losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(executor.adapt(*moved[:2]).cpu(), reference.adapt(*on_cpu[:2]), rtol=1e-9, atol=1e-11)
    if inputs:
        share = torch.rand(len(expected.task_losses), dtype=torch.float64)
        wanted = gradients(expected.task_losses @ share + expected.loss, inputs)
        found = gradients(got.task_losses @ share.cuda() + got.loss, moved_inputs)
        assert_close({name: value.cpu() for name, value in found.items()}, wanted)


@pytest.mark.parametrize("case", range(CASES))
def test_random_networks_by_step(case, shared_bytes):
    problem, support, query = random_problem(case)
    on_cpu = problem, support, replace(query, step_weights=None)
    moved = on_gpu(*on_cpu)
    got = executor_of(moved[0], moved[1].x).judge_steps(*moved)
    for found, wanted in zip(got, reference.judge_steps(*on_cpu), strict=True):
        torch.testing.assert_close(found.task_losses.cpu(), wanted.task_losses, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tasks", [1, 7, 300])
def test_tiles_of_large_pictures(tasks):
    """Conv4 with many channels, whose tasks do not fit in shared memory, by teams or one block each."""
    model = nn.Sequential(conv_block(3, 20), conv_block(20, 70), nn.Flatten(), nn.Linear(70 * 16, 5)).double()
    x, y = torch.randn(2, tasks, 5, 3, 17, 16, dtype=torch.float64), torch.randint(5, (2, tasks, 5))
    on_cpu = inner_problem(model, 0.05, 2), Support(x[0].requires_grad_(), y[0]), Query(x[1], y[1])
    got = run_all(*on_gpu(*on_cpu))
    assert_close({name: value.cpu() for name, value in got.items()}, run_all(*on_cpu))


def conv_block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_tensor_cores(precision, monkeypatch):
    """Factors are rounded, nothing else is; and float32 is float32."""
    monkeypatch.setenv("METAAUG_SHARED_BYTES", "1024")
    single = cast(torch.float32, inner_problem(convolutional(width=40), 0.1, 2), *conv_sets())
    expected = run_all(*cast(torch.float64, *single))
    moved = on_gpu(*single, dtype=torch.float32)
    exact, got = (
        {name: value.double().cpu() for name, value in run_all(replace(moved[0], precision=each), *moved[1:]).items()}
        for each in ("float32", precision)
    )
    roundoff = {"tf32": 2.0**-11, "bf16": 2.0**-9}[precision]
    assert_close(exact, expected, 600 * torch.finfo(torch.float32).eps)
    assert_close(got, expected, 36 * roundoff)
    assert max(errors(got, expected).values()) > roundoff / 4


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_tensor_cores_multiply_small_integers_exactly(precision, monkeypatch):
    monkeypatch.setenv("METAAUG_SHARED_BYTES", "1024")
    for channels, outputs, size, stride in ((3, 64, 9, 1), (33, 70, 6, 2), (64, 5, 4, 1)):
        model = nn.Conv2d(channels, outputs, 3, stride, padding=1).cuda()
        problem = inner_problem(model, 0.1, 0)
        weights = sum(value.numel() for value in model.parameters())
        flat = torch.randint(-2, 3, (4, weights), device="cuda").float().requires_grad_()
        x = torch.randint(-2, 3, (4, 3, channels, size, size), device="cuda").float().requires_grad_()
        executor, results = executor_of(problem, x), []
        for each in ("float32", precision):
            got = executor.predict(replace(problem, precision=each), flat, x)
            share = torch.arange(got.numel(), device="cuda").view_as(got) % 5 - 2.0
            results.append([got, *torch.autograd.grad(got, (flat, x), share)])
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("kind", ["perceptron", "convolutional"])
def test_single_precision(kind, steps, shared_bytes):
    model, sets = (mlp(), perceptron_sets()) if kind == "perceptron" else (convolutional(), conv_sets())
    single = cast(torch.float32, inner_problem(model, 0.1, steps), *sets)
    expected = run_all(*cast(torch.float64, *single))
    got = run_all(*on_gpu(*single, dtype=torch.float32))
    tolerance = 200 * (steps + 1) * torch.finfo(torch.float32).eps
    assert_close({name: value.double().cpu() for name, value in got.items()}, expected, tolerance)


@pytest.mark.parametrize("tasks", [1, 7, 300])
def test_same_bits_again_and_on_another_stream(tasks, shared_bytes):
    moved = on_gpu(inner_problem(mlp(), 0.1, 3), *perceptron_sets(tasks=tasks), dtype=torch.float32)
    first = run_all(*moved)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = run_all(*moved)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_meta_step_does_not_wait_for_the_gpu(shared_bytes):
    problem, support, query = on_gpu(inner_problem(mlp(), 0.1, 3), *perceptron_sets(), dtype=torch.float32)
    executor = executor_of(problem, support.x)
    executor.meta_loss(problem, support, query).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        executor.meta_loss(problem, support, query).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("net", ["mlp", "conv4"])
def test_a_learners_training_step_does_not_wait_for_the_gpu(net):
    """Episodes drawn there, the meta-loss, its gradient and the optimizer's step."""
    conv = net == "conv4"
    images = ClassSamples.from_arrays(torch.randint(256, (200, 28, 28)).byte(), torch.arange(200) % 10).to("cuda")
    episodes = mf.data.Episodes(images, ways=5, tasks=4)
    model = mf.models.conv4(ways=5) if conv else nn.Sequential(nn.Flatten(), nn.Linear(784, 5))
    maml = mf.MAML(model.cuda(), 0.1, 2)
    optimizer = torch.optim.Adam(maml.parameters(), 1e-3, fused=True)
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        try:
            optimizer.zero_grad()
            maml(next(episodes)).loss.backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert "fused engine (CUDA), " in str(mf.explain(model, torch.zeros(5, 1, 28, 28, device="cuda")))


def test_reptile_does_not_wait_for_the_gpu_and_moves_as_on_the_cpu():
    episodes = mf.data.Episodes(mf.data.Sinusoids(), shots=12, queries=3, tasks=4)
    tasks, moved = episodes.batch(0), []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        model = mf.models.mlp([1, 40, 40, 1]).to(device)
        reptile, there = mf.Reptile(model, 0.01, 3, inner_batch=5, loss="mse", meta_lr=0.5), tasks.to(device)
        for step in range(3):
            torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
            try:
                reptile.step(there)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        moved.append(torch.cat([value.detach().cpu().flatten() for value in model.parameters()]))
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-5)


def test_a_meta_step_can_be_captured_in_a_graph(shared_bytes):
    moved = problem, support, query = on_gpu(inner_problem(mlp(), 0.1, 3), *perceptron_sets(), dtype=torch.float32)
    executor, inputs = executor_of(problem, support.x), leaves(*moved)

    def step():
        return gradients(executor.meta_loss(problem, support, query).loss, inputs)

    expected, graph = step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for samples in range(1, 80):  # more plans than an engine keeps, apart from what a graph has captured
        small = on_gpu(problem, *perceptron_sets(samples=samples), dtype=torch.float32)[1:]
        executor.meta_loss(problem, *small)
    for value in captured.values():
        value.zero_()
    graph.replay()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


def test_a_replay_that_is_not_finite_is_named_by_the_next_call():
    problem, support, query = on_gpu(inner_problem(mlp(), 0.1, 3), *perceptron_sets(tasks=5), dtype=torch.float32)
    executor, graph, x = executor_of(problem, support.x), torch.cuda.CUDAGraph(), support.x.detach().clone()
    executor.meta_loss(problem, replace(support, x=x), query)
    with torch.cuda.graph(graph):
        executor.meta_loss(problem, replace(support, x=x), query)
    graph.replay()
    executor.meta_loss(problem, support, query)
    x[3, 0, 0] = torch.nan
    graph.replay()
    torch.cuda.synchronize()
    with pytest.raises(NonFiniteError, match=r"^in an earlier call, task 3, step 0: loss is nan"):
        executor.meta_loss(problem, support, query)


def test_what_a_graph_would_repeat_or_allocate_is_refused():
    def captured(call):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()

    problem, support, query = on_gpu(inner_problem(mlp(), 0.1, 1), *perceptron_sets(), dtype=torch.float32)
    executor = executor_of(problem, support.x)
    for _ in range(2):  # without an engine, and with one that has no plan
        with pytest.raises(ValueError, match="must have run before it is captured in a CUDA graph"):
            captured(lambda: executor.meta_loss(problem, support, query))
        executor.meta_loss(problem, replace(support, x=support.x[:, :2], y=support.y[:, :2]), query)
    dropout = inner_problem(nn.Sequential(nn.Dropout(0.5), problem.model), 0.1, 1, seed=1)
    executor_of(dropout, support.x).meta_loss(dropout, support, query)
    with pytest.raises(ValueError, match="dropout cannot be captured"):
        captured(lambda: executor_of(dropout, support.x).meta_loss(dropout, support, query))
    images = ClassSamples.from_arrays(torch.randint(256, (50, 6, 6)).byte(), torch.arange(50) % 10).to("cuda")
    episodes = mf.data.Episodes(images, ways=5, tasks=4)
    next(episodes)
    with pytest.raises(ValueError, match="episodes cannot be drawn in a CUDA graph"):
        captured(lambda: next(episodes))
    executor.meta_loss(problem, support, query)
    torch.cuda.synchronize()


def test_a_failure_is_told_although_calls_behind_it_were_queued():
    problem, support, query = on_gpu(inner_problem(mlp(), 0.1, 3), *perceptron_sets(tasks=5), dtype=torch.float32)
    executor = executor_of(problem, support.x)
    bad = support.x.detach().clone()
    bad[3, 0, 0] = torch.nan
    executor.meta_loss(problem, support, query)
    torch.cuda._sleep(10**9)  # half a second
    executor.meta_loss(problem, replace(support, x=bad), query)
    for _ in range(3):
        executor.meta_loss(problem, support, query)
    torch.cuda.synchronize()
    with pytest.raises(NonFiniteError, match=r"^in an earlier call, task 3, step 0: loss is nan"):
        executor.meta_loss(problem, support, query)


def test_plans_are_copied_in_the_order_of_the_stream():
    """Calls of new shapes behind work that keeps their stream busy."""
    stream = torch.cuda.Stream()
    for samples in range(3, 20):
        sets = on_gpu(inner_problem(mlp(), 0.1, 3), *perceptron_sets(samples=samples), dtype=torch.float32)
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.default_stream())
            torch.cuda._sleep(10**7)
            found = run_all(*sets)
        torch.cuda.synchronize()
        again = run_all(*sets)
        assert all(torch.equal(value, again[name]) for name, value in found.items())


def test_engines_of_many_threads_do_not_take_each_others_shared_memory():
    """Each needs another size of it."""
    calls = [
        on_gpu(inner_problem(mf.models.mlp([4, width, 2]), 0.1, 2), *perceptron_sets(tasks=20), dtype=torch.float32)
        for width in (8, 100, 300, 500)
    ]
    alone = [run_all(*call) for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        together = list(pool.map(lambda call: [run_all(*call) for _ in range(50)], calls))
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(value, each[name]) for each in found for name, value in expected.items())


def test_an_error_is_told_once():
    """A plan for which there is no memory (32 MiB of taps): what torch does next knows nothing of it."""
    model = nn.Sequential(nn.Conv2d(4096, 8, 32), nn.Flatten(), nn.Linear(8, 2))
    x, y = torch.randn(1, 1, 4096, 32, 32), torch.zeros(1, 1, dtype=torch.int64)
    problem, support, query = on_gpu(inner_problem(model, 0.1, 0), Support(x, y), Query(x, y), dtype=torch.float32)
    torch.cuda.empty_cache()
    held, size = [], torch.cuda.mem_get_info()[0]
    while size >= 2**20:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    with pytest.raises(RuntimeError, match=r"(?i)out of memory"):
        executor_of(problem, support.x).meta_loss(problem, support, query)
    held.clear()
    torch.cuda.empty_cache()
    assert float((torch.ones(3, device="cuda") + 1).sum()) == 6
    assert executor_of(problem, support.x).meta_loss(problem, support, query).loss.isfinite()


def test_what_is_not_finite_is_named_by_the_next_call():
    problem, support, query = on_gpu(inner_problem(mlp(), 0.1, 3), *perceptron_sets(tasks=5), dtype=torch.float32)
    executor = executor_of(problem, support.x)
    before = executor.meta_loss(problem, support, query).task_losses.clone()
    bad = support.x.detach().clone()
    bad[3, 0, 0] = torch.nan
    executor.meta_loss(problem, replace(support, x=bad), query)
    torch.cuda.synchronize()
    with pytest.raises(NonFiniteError, match=r"^in an earlier call, task 3, step 0: loss is nan"):
        executor.meta_loss(problem, support, query)
    assert torch.equal(executor.meta_loss(problem, support, query).task_losses, before)


def test_running_out_of_memory_leaves_nothing_behind():
    problem, support, query = on_gpu(inner_problem(mlp(), 0.1, 2), *perceptron_sets(), dtype=torch.float32)
    executor = executor_of(problem, support.x)
    before = executor.meta_loss(problem, support, query).task_losses.clone()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        torch.cuda.empty_cache()
        with pytest.raises(torch.OutOfMemoryError):
            executor.adapt(problem, replace(support, x=support.x.repeat(2000, 1, 1), y=support.y.repeat(2000, 1)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(executor.meta_loss(problem, support, query).task_losses, before)


def test_learners_and_evaluation_on_the_gpu():
    episodes = mf.data.Episodes(mf.data.Sinusoids(), shots=5, queries=5, tasks=4)
    maml = mf.MAML(mf.models.mlp([1, 40, 40, 1]).cuda(), 0.01, 3, loss="mse")
    tasks = episodes.batch(0).to("cuda")
    report = mf.check_gradients(maml, tasks)
    assert report.ok, report
    assert report.executor == "fused"
    with pytest.raises(ValueError, match="device of"):
        maml(episodes.batch(0))


def test_episodes_drawn_on_the_gpu_are_those_of_the_cpu():
    dataset = ClassSamples.from_arrays(torch.randint(256, (200, 28, 28)).byte(), torch.arange(200) % 10)
    on_cpu, on_gpu = (mf.data.Episodes(each, queries=3, tasks=7, seed=5) for each in (dataset, dataset.to("cuda")))
    for index in (0, 9):
        expected, got = on_cpu.batch(index), on_gpu.batch(index)
        for name in ("support_x", "support_y", "query_x", "query_y"):
            assert torch.equal(getattr(got, name).cpu(), getattr(expected, name))
    dataset = ClassSamples.from_arrays(torch.zeros(40_000, 1, dtype=torch.uint8), torch.arange(40_000) % 2)
    many = mf.data.Episodes(dataset.to("cuda"), ways=2, shots=10_000, queries=10_000)
    with pytest.raises(ValueError, match="on this GPU"):
        many.batch(0)
