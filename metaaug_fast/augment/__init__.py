"""Augmentation: learned, of what tasks adapt on, for how well they then do on real queries; and of whole tasks."""

from ..learners.supervised import classifier_accuracy, train_classifier
from .augmented import Augmented
from .distil import DistilledSet, distil
from .enlarge import Augmenter, generate_augmented_data
from .from_scratch import FromScratch, random_starts
from .generate import FlowTasks, Generator
from .hallucinate import Hallucination, PictureGenerator, VectorGenerator
from .learned import LearnedLabels, LearnedWeights
from .maxup import MaxUp
from .policy import AugmentationPolicy, PolicyTransform, support_network
from .retrieve import Found, Retrieval
from .tasks import (
    Compose,
    InterpolateTasks,
    MoreShots,
    OnQueries,
    OnSupport,
    QuarterTurns,
    ShuffleLabels,
)
from .transforms import PICTURES, SENTENCES, TRANSFORMS, VECTORS, Drawn, Transform

__all__ = [
    "PICTURES",
    "SENTENCES",
    "TRANSFORMS",
    "VECTORS",
    "AugmentationPolicy",
    "Augmented",
    "Augmenter",
    "Compose",
    "DistilledSet",
    "Drawn",
    "FlowTasks",
    "Found",
    "FromScratch",
    "Generator",
    "Hallucination",
    "InterpolateTasks",
    "LearnedLabels",
    "LearnedWeights",
    "MaxUp",
    "MoreShots",
    "OnQueries",
    "OnSupport",
    "PictureGenerator",
    "PolicyTransform",
    "QuarterTurns",
    "Retrieval",
    "ShuffleLabels",
    "Transform",
    "VectorGenerator",
    "classifier_accuracy",
    "distil",
    "generate_augmented_data",
    "random_starts",
    "support_network",
    "train_classifier",
]
