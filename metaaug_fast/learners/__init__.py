"""One file an algorithm; `base.py` is the contract that all keep."""

from .adml import ADML
from .adv_query import AdversarialQuerying, AttackedQueries
from .anil import ANIL
from .attacks import FGSM, PGD, attack_queries
from .base import Adapted, Learner, Predictor, class_means, class_members, one_task_too
from .boil import BOIL
from .cavia import CAVIA, Contextual
from .cnp import CNP
from .encoder import EncoderLearner
from .gradient import GradientLearner
from .hard_tasks import HardTasks
from .imaml import IMAML
from .maml import MAML
from .mamlpp import MAMLpp
from .matching import MatchingNet
from .meta_sgd import MetaSGD
from .meta_transfer import MetaTransfer
from .metagan import MetaGAN
from .platipus import PLATIPUS
from .prompt import PromptTuning
from .proto_maml import ProtoMAML
from .protonet import ProtoNet
from .r2d2 import R2D2
from .relation import RelationNet
from .reptile import Reptile
from .snail import SNAIL
from .unrolled import UnrolledLearner

LEARNERS = {
    "adml": ADML,
    "adv_query": AdversarialQuerying,
    "anil": ANIL,
    "boil": BOIL,
    "cavia": CAVIA,
    "cnp": CNP,
    "imaml": IMAML,
    "maml": MAML,
    "mamlpp": MAMLpp,
    "matching": MatchingNet,
    "meta_sgd": MetaSGD,
    "meta_transfer": MetaTransfer,
    "metagan": MetaGAN,
    "platipus": PLATIPUS,
    "prompt": PromptTuning,
    "proto_maml": ProtoMAML,
    "protonet": ProtoNet,
    "r2d2": R2D2,
    "relation": RelationNet,
    "reptile": Reptile,
    "snail": SNAIL,
}
"""The names by which a run knows them."""

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
    "Adapted",
    "AdversarialQuerying",
    "AttackedQueries",
    "Contextual",
    "EncoderLearner",
    "GradientLearner",
    "HardTasks",
    "Learner",
    "MAMLpp",
    "MatchingNet",
    "MetaGAN",
    "MetaSGD",
    "MetaTransfer",
    "Predictor",
    "PromptTuning",
    "ProtoMAML",
    "ProtoNet",
    "RelationNet",
    "Reptile",
    "UnrolledLearner",
    "attack_queries",
    "class_means",
    "class_members",
    "one_task_too",
]
