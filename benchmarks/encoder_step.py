"""What a meta-step costs of learners that encode: beside the bare network, and beside a loop over single episodes.

`python benchmarks/encoder_step.py`: 32 tasks, 5-way 1-shot with 5 queries a class, Conv4-64 on 28x28 pictures; medians
of rounds in which everybody takes turns. The floor of a learner is the same flattened batch through its network alone,
forward and backward in plain torch, of as many samples as the learner encodes. The loop is Prototypical Networks as
scripts write them, an episode at a time.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from meta_step import medians, tasks_of
from torch import nn

import metaaug_fast as mf
from metaaug_fast.cli.options import keep_freed_memory
from metaaug_fast.learners import LEARNERS
from metaaug_fast.report.tables import markdown

TASKS, ROUNDS = 32, 7
OTHERS = {"relation": {"pools": 2, "maps": True}}
"""Options of the network that a learner's paper has in another form."""


def network(name: str) -> nn.Module:
    """Conv4-64 as the learner takes it."""
    return mf.models.conv4(ways=None, **OTHERS.get(name, {}))


def bare(model: nn.Module, tasks: mf.TaskBatch) -> None:
    """All samples through the network, and back."""
    model.zero_grad()
    model(torch.cat([tasks.support_x, tasks.query_x], 1).flatten(0, 1)).square().mean().backward()


def episodes(model: nn.Module, optimizer: torch.optim.Optimizer, tasks: mf.TaskBatch) -> None:
    """Prototypical Networks, a step for each episode."""
    for x, y, query_x, query_y in zip(*tasks.tensors, strict=True):
        embedded, queries = model(x), model(query_x)
        prototypes = torch.stack([embedded[y == way].mean(0) for way in range(5)])
        loss = F.cross_entropy(-torch.cdist(queries, prototypes).square(), query_y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(as many as torch takes)")
    torch.set_num_threads(parser.parse_args().threads)
    keep_freed_memory()
    tasks, calls = tasks_of((1, 28, 28), TASKS, 1, 5), {}
    names = [name for name, make in LEARNERS.items() if make.encoder and name != "prompt"]  # that of sentences
    for name in names:
        learner, model = LEARNERS[name](network(name)), network(name)
        optimizers = learner.optimizers()
        calls[name] = lambda learner=learner, optimizers=optimizers: learner.meta_step(tasks, optimizers)
        calls[f"{name}, bare"] = lambda model=model: bare(model, tasks)
    model = network("protonet")
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    calls["loop"] = lambda: episodes(model, optimizer, tasks)
    found = medians(calls, ROUNDS)
    rows = [
        (name, f"{found[name]:.0f}", f"{found[f'{name}, bare']:.0f}", f"{found[name] / found[f'{name}, bare']:.2f}")
        for name in names
    ]
    print(f"T={TASKS} S=5 Q=25, Conv4-64, {torch.get_num_threads()} threads\n")
    print(markdown(("learner", "ms a meta-step", "bare network, ms", "ratio"), rows))
    ours, loop = found["protonet"] / TASKS, found["loop"] / TASKS
    print(
        f"\nProtoNet an episode: {ours:.1f} ms; by hand, an episode at a time: {loop:.1f} ms, {loop / ours:.1f} times"
    )


if __name__ == "__main__":
    main()
