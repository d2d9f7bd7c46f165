"""One of two processes that train together: `python distributed.py RANK FOLDER`."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn


def step(learner: nn.Module, share: object) -> dict[str, torch.Tensor | None]:
    """The loss of this process's share of the tasks, and the gradients of every process's."""
    parallel = nn.parallel.DistributedDataParallel(learner)  # averages gradients as long as it lives
    out = parallel(share)
    out.loss.backward()
    return {"loss": out.loss.detach(), **{name: value.grad for name, value in learner.named_parameters()}}


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    learners, shares = torch.load(folder / "given", weights_only=False)
    if rank:
        for value in nn.ModuleDict(learners).parameters():
            nn.init.zeros_(value)  # the first process's are to come
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found = {backend: step(learner, shares[rank]) for backend, learner in learners.items()}
        torch.save(found, folder / f"rank{rank}")
        distributed.barrier()  # who leaves first takes the other's connection along
    finally:
        distributed.destroy_process_group()
    os._exit(0)  # torch's threads outlive the group and may abort in an interpreter that ends (pytorch issue 190489)
