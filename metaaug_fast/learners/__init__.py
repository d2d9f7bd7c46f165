"""One file an algorithm; `base.py` is the contract that all keep."""

from .base import Adapted, Learner, Predictor, class_means, one_task_too
from .gradient import GradientLearner
from .maml import MAML
from .protonet import ProtoNet
from .reptile import Reptile
from .unrolled import UnrolledLearner

LEARNERS = {"maml": MAML, "protonet": ProtoNet, "reptile": Reptile}
"""The names by which a run knows them."""

__all__ = [
    "MAML",
    "Adapted",
    "GradientLearner",
    "Learner",
    "Predictor",
    "ProtoNet",
    "Reptile",
    "UnrolledLearner",
    "class_means",
    "one_task_too",
]
