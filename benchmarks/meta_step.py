"""One exact second-order meta-gradient, here and with `torch.func.vmap`, taking turns in one process.

python benchmarks/meta_step.py                  # a row a workload: medians, ratio, relative difference in float64
"""

from __future__ import annotations

import argparse

import torch

import metaaug_fast as mf
from metaaug_fast.demo import compare, difference


def sinusoid(tasks: int, steps: int) -> tuple[mf.MAML, mf.TaskBatch]:
    """The paper's sinusoid net, ten points."""
    batch = mf.data.Episodes(mf.data.Sinusoids(), shots=10, queries=10, tasks=tasks).batch(0)
    return mf.MAML(mf.models.mlp([1, 40, 40, 1]), inner_lr=0.01, inner_steps=steps, loss="mse"), batch


def conv4(tasks: int, steps: int, shots: int, queries: int) -> tuple[mf.MAML, mf.TaskBatch]:
    """The pooled Conv4-64 on random 28x28 pictures, 5-way."""
    sets = []
    for count in (5 * shots, 5 * queries):
        sets += [torch.rand(tasks, count, 1, 28, 28), torch.arange(count).remainder(5).repeat(tasks, 1)]
    return mf.MAML(mf.models.conv4(ways=5), inner_lr=0.4, inner_steps=steps), mf.TaskBatch(*sets)


WORKLOADS = {
    "sinusoid MLP 1-40-40-1, T=25 K=1": lambda: sinusoid(25, 1),
    "sinusoid MLP 1-40-40-1, T=25 K=5": lambda: sinusoid(25, 5),
    "sinusoid MLP 1-40-40-1, T=1000 K=5": lambda: sinusoid(1000, 5),
    "Conv4-64 28x28 5-way, T=8 K=1 S=5 Q=5": lambda: conv4(8, 1, 1, 1),
    "Conv4-64 28x28 5-way, T=4 K=5 S=25 Q=75": lambda: conv4(4, 5, 5, 15),
}


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--only", default="", help="workloads whose name contains this")
    given = options.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    print(f"{'':42}{'metaaug_fast':>14}{'torch.func vmap':>18}{'ratio':>8}{'difference':>12}")
    for name, make in WORKLOADS.items():
        if given.only not in name:
            continue
        learner, tasks = make()
        ours, theirs = compare(learner, tasks, given.rounds)
        apart = difference(learner, tasks)
        print(f"{name:42}{1e3 / ours:11.2f} ms{1e3 / theirs:15.2f} ms{ours / theirs:8.1f}{apart:12.0e}", flush=True)


if __name__ == "__main__":
    main()
