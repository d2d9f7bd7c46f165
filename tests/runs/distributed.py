"""One of two processes that train one learner together: `python distributed.py RANK FOLDER`."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn

import metaaug_fast as mf


class Share:
    """This process's tasks of every batch."""

    def __init__(self, episodes, rank):
        self.episodes, self.rank = episodes, rank

    def __next__(self):
        return next(self.episodes).split(self.episodes.tasks // 2)[self.rank]

    def state_dict(self):
        return self.episodes.state_dict()

    def load_state_dict(self, state):
        self.episodes.load_state_dict(state)


def episodes():
    return mf.data.Episodes(mf.data.Sinusoids(), shots=5, queries=5, tasks=6, seed=3)


def learner(seed):
    torch.manual_seed(seed)
    return mf.MAML(mf.models.mlp([1, 8, 1]), inner_lr=0.01, loss="mse")


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        parallel = nn.parallel.DistributedDataParallel(learner(seed=rank))  # the second takes the first's weights
        path = folder / "run.safetensors" if rank == 0 else None
        mf.train(parallel, Share(episodes(), rank), 4, meta_lr=0.01, checkpoint=path, progress=False)
        found = mf.evaluate(parallel, episodes(), 12)
        refused = ""
        try:
            wrapped = nn.parallel.DistributedDataParallel(mf.Reptile(mf.models.mlp([1, 8, 1]), loss="mse"))
            mf.train(wrapped, Share(episodes(), rank), 1, progress=False)
        except ValueError as error:
            refused = str(error)
        torch.save((parallel.module.state_dict(), found.mean, refused), folder / f"rank{rank}")
        distributed.barrier()  # who leaves first takes the other's connection along
    finally:
        distributed.destroy_process_group()
    os._exit(0)  # torch's threads outlive the group and may abort in an interpreter that ends (pytorch issue 190489)
