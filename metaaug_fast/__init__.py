"""Exact, fused meta-learning: adaptation as one differentiable call.

>>> import torch, metaaug_fast as mf
>>> maml = mf.MAML(mf.models.mlp([1, 40, 40, 1]), inner_lr=0.01, loss="mse")
>>> tasks = mf.TaskBatch(*(torch.randn(25, 10, 1) for _ in range(4)))   # support x and y, query x and y
>>> maml(tasks).loss.backward()
"""

from . import data, models
from .check_gradients import GradientReport, check_gradients
from .errors import CheckpointError, FallbackWarning, FileWriteError, NonFiniteError, NotFusedError
from .evaluation import Evaluation, evaluate
from .explain import explain
from .history import History
from .inner_loop import FastWeights, inner_loop
from .learners.maml import MAML
from .learners.reptile import Reptile
from .problem import MetaOutput
from .tasks import TaskBatch
from .training import train

__all__ = [
    "MAML",
    "CheckpointError",
    "Evaluation",
    "FallbackWarning",
    "FastWeights",
    "FileWriteError",
    "GradientReport",
    "History",
    "MetaOutput",
    "NonFiniteError",
    "NotFusedError",
    "Reptile",
    "TaskBatch",
    "check_gradients",
    "data",
    "evaluate",
    "explain",
    "inner_loop",
    "models",
    "train",
]
