"""Times workloads on the GPU that is here beside rivals, in one run: `python benchmarks/gpu.py [NAME ...] [--out DIR]`.

Every result is compared with the reference in float64 first. Times are medians over rounds in turns, and each call is
waited for; so what Python costs is in them, as it is for users. Rows "in a graph" replay the same call from a CUDA
graph, where Python costs nothing. First come the longest time in which a captured meta-step leaves the GPU idle and,
where METAAUG_DATA has Omniglot, a meta-step of MAML's recipe, episodes and optimizer included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np
import torch

import metaaug_fast as mf
from metaaug_fast.bench.operations import count
from metaaug_fast.bench.rivals import OURS, RIVALS
from metaaug_fast.bench.workloads import WORKLOADS, Workload
from metaaug_fast.runs.build import fitted, make_episodes, make_learner, make_sources
from metaaug_fast.runs.config import configure

NAMES = (
    "conv4-t32-k1",
    "sinusoid-t25-k5",
    "sinusoid-t1000-k5",
    "omniglot-mlp-t32-k1",
    "conv4-t8-k1",
    "sinusoid-t25-k1",
)
GRAPH = " in a graph"
PRECISIONS = (" tf32", " bf16")
ROWS = (*PRECISIONS, GRAPH)
RIVAL_ROWS = ("vmap", "vmap" + GRAPH, "compile", "compile" + GRAPH, "jax")
ROUNDS, ROUND_SECONDS = 7, 0.2
WRONG = {" tf32": 3e-2, " bf16": 2e-1}  # relative errors; 1e-2 of what computes in float32


@dataclass
class Row:
    """error: relative, against the reference in float64. first: seconds of the first call. median: of later ones."""

    error: float | str
    first: float = 0.0
    median: float = 0.0
    spread: tuple[float, float] = (0.0, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--rivals", nargs="*", default=RIVAL_ROWS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no workload is begun")
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    limits = ceilings()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ceilings": limits}
    print(json.dumps(found))

    def keep(name: str, value: Any) -> None:
        found[name] = value
        if arguments.out:
            (arguments.out / "gpu.json").write_text(json.dumps(found, indent=1))

    idle = longest_gap(WORKLOADS["conv4-t32-k1"])
    keep("longest gap in a captured meta-step, microseconds", idle)
    print(f"conv4-t32-k1, captured with its optimizer: the GPU is idle for {idle:.1f} us at most")
    root = Path(os.environ.get("METAAUG_DATA", "../shared/data")) / "omniglot"
    if root.exists():
        milliseconds = recipe(root)
        keep("omniglot recipe, ms a meta-step", milliseconds)
        print(f"MAML on Omniglot, 5-way 1-shot, 32 tasks: {milliseconds:.3f} ms a meta-step")
    for name in arguments.names:
        if time.perf_counter() - started > arguments.seconds:
            print(f"\n{name}: not begun, for {arguments.seconds:g} seconds are over")
            continue
        workload = WORKLOADS[name]
        rows = measure(workload, [OURS, *(OURS + each for each in ROWS), *arguments.rivals])
        report(workload, rows, limits)
        keep(name, {rival: vars(row) for rival, row in rows.items()})


def report(workload: Workload, rows: dict[str, Row], limits: dict[str, float]) -> None:
    print(f"\n{workload}")
    cost = count(workload)
    for name, row in rows.items():
        speed = ""
        if row.median:
            flops, traffic = cost.flops / row.median / 1e12, cost.bytes / row.median / 1e12
            shares = f"({flops / limits['gemm']:4.0%}) {traffic:6.2f} TB/s ({traffic / limits['copy']:4.0%})"
            speed = f"{flops:7.2f} TFLOP/s {shares}"
        print(f"  {name:24} {row.median * 1e3:9.3f} ms {speed}  first {row.first:6.2f} s  error {row.error}")
    best = min((row.median for name, row in rows.items() if not name.startswith(OURS) and row.median), default=0.0)
    for name in (OURS, OURS + " tf32", OURS + GRAPH):
        if best and rows[name].median:
            print(f"  {name}: {best / rows[name].median:.1f}x the best rival, in a graph or not")


def ceilings() -> dict[str, float]:
    """Of products in float32 and TF32, and of copies: TFLOP/s and TB/s."""
    a, b = torch.rand(2, 4096, 4096, device="cuda")
    source, target = torch.rand(2, 2**28, device="cuda")
    product, copy = (min(seconds(call, 0.5)) for call in (lambda: a @ b, lambda: target.copy_(source)))
    torch.backends.cuda.matmul.allow_tf32 = True
    rounded = min(seconds(lambda: a @ b, 0.5))
    torch.backends.cuda.matmul.allow_tf32 = False
    flops = 2 * 4096**3 / 1e12
    return {"gemm": flops / product, "gemm in tf32": flops / rounded, "copy": 8 * 2**28 / copy / 1e12}


def measure(workload: Workload, names: list[str]) -> dict[str, Row]:
    """A row for each rival; those that are right take turns."""
    expected = arrays(RIVALS["loop"].build(workload, workload.model().double(), workload.inputs().to(torch.float64))())
    rows, calls = {}, {}
    built: dict[str, Callable[[], Any]] = {}  # what a row and the one in a graph share, for compiling takes long
    for name in names:
        try:
            started = time.perf_counter()
            rival = name.removesuffix(GRAPH)
            if rival not in built:
                built[rival] = on_gpu(workload, rival)
            calls[name] = call = waited(captured(built[rival]) if name.endswith(GRAPH) else built[rival])
            error = relative_error(workload, arrays(call()), expected)
            rows[name] = Row(error, time.perf_counter() - started)
            if not error < WRONG.get(name.removeprefix(OURS), 1e-2):
                raise ValueError(f"wrong by {error:.1e}")
        except Exception as failure:  # a rival may fail in any way
            rows[name] = Row(f"{type(failure).__name__}: {failure}"[:200])
            calls.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].extend(seconds(call, ROUND_SECONDS))
    for name, each in times.items():
        quartiles = statistics.quantiles(each, n=4) if len(each) > 1 else [each[0]] * 3
        rows[name].median, rows[name].spread = statistics.median(each), (quartiles[0], quartiles[2])
    return rows


def on_gpu(workload: Workload, rival: str) -> Callable[[], Any]:
    """A rival's call on the GPU. JAX moves its data itself."""
    if rival == "jax":
        import jax

        call = RIVALS[rival].build(workload, workload.model(), workload.inputs())
        return lambda: jax.block_until_ready(call())
    model, tasks = workload.model().cuda(), workload.inputs().to("cuda")
    if rival.startswith(OURS):
        learner = workload.learner(model)
        learner.precision = rival.removeprefix(OURS).strip() or "float32"
        parameters = list(model.parameters())
        return lambda: torch.autograd.grad(learner(tasks).loss, parameters)
    return RIVALS[rival].build(workload, model, tasks)


def waited(call: Callable[[], Any]) -> Callable[[], Any]:
    def wait() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    return wait


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def longest_gap(workload: Workload) -> float:
    """Microseconds without a kernel between the first and the last of a captured meta-step, optimizer included."""
    model, tasks = workload.model().cuda(), workload.inputs().to("cuda")
    learner = workload.learner(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True, capturable=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        learner(tasks).loss.backward()
        optimizer.step()

    replay = waited(captured(step))
    replay()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
    kernels = [each for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((each.time_range.start, each.time_range.end) for each in kernels)
    gaps, end = [0.0], spans[0][1]
    for start, next_end in spans:
        gaps.append(start - end)
        end = max(end, next_end)
    return max(gaps)


def recipe(root: Path, steps: int = 500) -> float:
    """Milliseconds a meta-step of the paper's recipe, measured over steps that nothing waits in."""
    config = configure(mf.runs.recipe("maml-omniglot"), ["--root", str(root)])
    source = make_sources(config.data, ["train"], device="cuda")["train"]
    learner = make_learner(fitted(config, source.sample_shape, None), "cuda")
    episodes, optimizers = make_episodes(config, "train", source), learner.optimizers(config.training.meta_lr)
    started = 0.0
    for done in range(steps + 50):
        if done == 50:
            torch.cuda.synchronize()
            started = time.perf_counter()
        learner.meta_step(next(episodes), optimizers)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps * 1e3


def seconds(call: Callable[[], Any], enough: float) -> list[float]:
    """Of single calls, for about so many seconds in all."""
    times: list[float] = []
    torch.cuda.synchronize()
    while sum(times) < enough and len(times) < 200:
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times


def arrays(result: Any) -> list[np.ndarray]:
    return [each.detach().cpu().numpy() if isinstance(each, torch.Tensor) else np.asarray(each) for each in result]


def relative_error(workload: Workload, got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Of all that the workload checks, as one vector."""
    names = [name for name, _ in workload.model().named_parameters()]
    kept = [i for i in range(len(expected)) if len(expected) != len(names) or workload.checks(names[i])]
    difference = sum(float(((got[i] - expected[i]) ** 2).sum()) for i in kept)
    return float(np.sqrt(difference / sum(float((expected[i] ** 2).sum()) for i in kept)))


if __name__ == "__main__":
    main()
