"""One file an algorithm; `base.py` is the contract that all keep."""

from .anil import ANIL
from .base import Adapted, Learner, Predictor, class_means, one_task_too
from .boil import BOIL
from .gradient import GradientLearner
from .maml import MAML
from .meta_sgd import MetaSGD
from .protonet import ProtoNet
from .reptile import Reptile
from .unrolled import UnrolledLearner

LEARNERS = {
    "anil": ANIL,
    "boil": BOIL,
    "maml": MAML,
    "meta_sgd": MetaSGD,
    "protonet": ProtoNet,
    "reptile": Reptile,
}
"""The names by which a run knows them."""

__all__ = [
    "ANIL",
    "BOIL",
    "MAML",
    "Adapted",
    "GradientLearner",
    "Learner",
    "MetaSGD",
    "Predictor",
    "ProtoNet",
    "Reptile",
    "UnrolledLearner",
    "class_means",
    "one_task_too",
]
