"""A small run with all its parts, and how two learners are compared."""

import torch
from torch import nn

from metaaug_fast.data import Episodes, Sinusoids
from metaaug_fast.learners.maml import MAML
from metaaug_fast.learners.reptile import Reptile


def parts(seed=0, dropout=0.0, kind="maml", optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2)):
    """A learner with episodes, and an optimizer and a scheduler where it has them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
    episodes = Episodes(Sinusoids(), shots=5, queries=5, tasks=3, seed=seed)
    if kind == "reptile":
        return Reptile(model, inner_lr=0.01, inner_batch=2, loss="mse", seed=seed), episodes, {}
    learner = MAML(model, inner_lr=0.01, loss="mse")
    made = optimizer(learner.parameters())
    return learner, episodes, {"optimizer": made, "scheduler": torch.optim.lr_scheduler.ExponentialLR(made, 0.9)}


def assert_same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
