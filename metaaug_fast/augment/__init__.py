"""Learned augmentation: of what tasks adapt on, for how well they then do on real queries."""

from .distil import DistilledSet, distil, random_starts
from .generate import FlowTasks, Generator
from .hallucinate import Hallucination, PictureGenerator, VectorGenerator
from .learned import LearnedLabels, LearnedWeights
from .policy import AugmentationPolicy, PolicyTransform, support_network
from .retrieve import Found, Retrieval
from .transforms import PICTURES, TRANSFORMS, VECTORS, Drawn, Transform

__all__ = [
    "PICTURES",
    "TRANSFORMS",
    "VECTORS",
    "AugmentationPolicy",
    "DistilledSet",
    "Drawn",
    "FlowTasks",
    "Found",
    "Generator",
    "Hallucination",
    "LearnedLabels",
    "LearnedWeights",
    "PictureGenerator",
    "PolicyTransform",
    "Retrieval",
    "Transform",
    "VectorGenerator",
    "distil",
    "random_starts",
    "support_network",
]
