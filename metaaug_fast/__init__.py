"""Exact, fused meta-learning: adaptation as one differentiable call.

>>> import torch, metaaug_fast as mf
>>> maml = mf.MAML(mf.models.mlp([1, 40, 40, 1]), inner_lr=0.01, loss="mse")
>>> tasks = mf.TaskBatch(*(torch.randn(25, 10, 1) for _ in range(4)))   # support x and y, query x and y
>>> maml(tasks).loss.backward()
"""

from importlib.metadata import version

from . import augment, compat, data, learners, models, runs
from .augment import generate_augmented_data
from .engine import reference
from .engine.fast_weights import FastWeights
from .engine.loop import inner_loop
from .errors import (
    CheckpointError,
    ContractError,
    ConvergenceWarning,
    FallbackWarning,
    FileWriteError,
    NonFiniteError,
    NotFusedError,
)
from .inspect.contract import ContractReport, check_learner
from .inspect.explanation import explain
from .inspect.gradients import GradientReport, check_gradients
from .learners import (
    ADML,
    ANIL,
    BOIL,
    CAVIA,
    CNP,
    FGSM,
    IMAML,
    MAML,
    PGD,
    PLATIPUS,
    R2D2,
    SNAIL,
    AdversarialQuerying,
    Learner,
    MAMLpp,
    MatchingNet,
    MetaGAN,
    MetaSGD,
    MetaTransfer,
    PromptTuning,
    ProtoMAML,
    ProtoNet,
    RelationNet,
    Reptile,
)
from .learners.supervised import classifier_accuracy, train_classifier
from .runs.conformal import Conformal, conformal
from .runs.evaluation import Evaluation, evaluate
from .runs.history import History
from .runs.load import load
from .runs.training import train
from .tasks import MetaOutput, TaskBatch

__version__ = version("metaaug_fast")

__all__ = [
    "ADML",
    "ANIL",
    "BOIL",
    "CAVIA",
    "CNP",
    "FGSM",
    "IMAML",
    "MAML",
    "PGD",
    "PLATIPUS",
    "R2D2",
    "SNAIL",
    "AdversarialQuerying",
    "CheckpointError",
    "Conformal",
    "ContractError",
    "ContractReport",
    "ConvergenceWarning",
    "Evaluation",
    "FallbackWarning",
    "FastWeights",
    "FileWriteError",
    "GradientReport",
    "History",
    "Learner",
    "MAMLpp",
    "MatchingNet",
    "MetaGAN",
    "MetaOutput",
    "MetaSGD",
    "MetaTransfer",
    "NonFiniteError",
    "NotFusedError",
    "PromptTuning",
    "ProtoMAML",
    "ProtoNet",
    "RelationNet",
    "Reptile",
    "TaskBatch",
    "augment",
    "check_gradients",
    "check_learner",
    "classifier_accuracy",
    "compat",
    "conformal",
    "data",
    "evaluate",
    "explain",
    "generate_augmented_data",
    "inner_loop",
    "learners",
    "load",
    "models",
    "reference",
    "runs",
    "train",
    "train_classifier",
]
