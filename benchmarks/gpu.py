"""Times workloads on the GPU that is here beside rivals, in one run: `python benchmarks/gpu.py [NAME ...] [--out DIR]`.

Every result is compared with the reference in float64 first. Times are medians over rounds in turns, and each call is
waited for; so what Python costs is in them, as it is for users.
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

from metaaug_fast.bench.operations import count
from metaaug_fast.bench.rivals import OURS, RIVALS, Build
from metaaug_fast.bench.workloads import WORKLOADS, Workload

NAMES = (
    "sinusoid-t25-k1",
    "sinusoid-t25-k5",
    "sinusoid-t1000-k5",
    "omniglot-mlp-t32-k1",
    "conv4-t8-k1",
    "conv4-t32-k1",
)
RIVAL_NAMES = ("vmap", "compile", "jax")
ROUNDS, ROUND_SECONDS = 9, 0.2


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
    parser.add_argument("--rivals", nargs="*", default=RIVAL_NAMES)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ceilings": ceilings()}
    print(json.dumps(found))
    for name in arguments.names:
        workload = WORKLOADS[name]
        rows = measure(workload, [OURS, *arguments.rivals])
        found[name] = {rival: vars(row) for rival, row in rows.items()}
        print(f"\n{workload}")
        best = min((row.median for rival, row in rows.items() if rival != OURS and row.median), default=0.0)
        for rival, row in rows.items():
            print(f"  {rival:14} {row.median * 1e3:9.3f} ms  first {row.first:7.2f} s  error {row.error}")
        ours = rows[OURS].median
        if ours:
            flops = count(workload).flops
            print(
                f"  {best / ours:.1f}x the best rival; {flops / ours / 1e12:.2f} TFLOP/s by the algorithm's operations"
            )
        if arguments.out:
            (arguments.out / "gpu.json").write_text(json.dumps(found, indent=1))


def ceilings() -> dict[str, float]:
    """Of float32 products and of copies, TFLOP/s and TB/s."""
    a, b = torch.rand(2, 4096, 4096, device="cuda")
    source, target = torch.rand(2, 2**28, device="cuda")
    product, copy = (seconds(call, 0.5)[0] for call in (lambda: a @ b, lambda: target.copy_(source)))
    return {"gemm": 2 * 4096**3 / product / 1e12, "copy": 8 * 2**28 / copy / 1e12}


def measure(workload: Workload, names: list[str]) -> dict[str, Row]:
    """A row for each rival; those that are right take turns."""
    expected = arrays(RIVALS["loop"].build(workload, workload.model().double(), workload.inputs().to(torch.float64))())
    rows, calls = {}, {}
    for name in names:
        try:
            started = time.perf_counter()
            calls[name] = call = prepared(RIVALS[name].build, workload, name)
            error = relative_error(workload, arrays(call()), expected)
            rows[name] = Row(error, time.perf_counter() - started)
            if error > 1e-2:
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


def prepared(build: Build, workload: Workload, name: str) -> Callable[[], Any]:
    """A rival's call on the GPU, which has ended when it returns. JAX moves its data itself."""
    if name == "jax":
        import jax

        call = build(workload, workload.model(), workload.inputs())
        return lambda: jax.block_until_ready(call())
    call = build(workload, workload.model().cuda(), workload.inputs().to("cuda"))

    def waited() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    return waited


def seconds(call: Callable[[], Any], enough: float) -> list[float]:
    """Of single calls, for about so many seconds in all."""
    times: list[float] = []
    torch.cuda.synchronize()
    while sum(times) < enough and len(times) < 200:
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return [min(times)] if enough > ROUND_SECONDS else times


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
