"""Data as episodes: labelled samples, function families, and the sampler that turns them into task batches."""

from .completion import Completion
from .draws import Draws
from .episodes import Episodes, Loader
from .fixed import load_tasks, save_tasks
from .fixed_labels import FixedLabels
from .pixels import Pixels
from .readers import (
    READERS,
    AmbiguousCurves,
    Cifar10,
    Cifar100,
    Clinc150,
    FashionMnist,
    Folder,
    GaussianProcesses,
    Glyphs,
    Idx,
    Kmnist,
    MiniImageNet,
    Mnist,
    Omniglot,
    Sinusoids,
    Text,
    download_omniglot,
)
from .samples import ClassSamples
from .source import EpisodeSpec, TaskSource

SOURCES = {**READERS, "completion": Completion}
"""The names by which a run knows them."""

ClassImages = ClassSamples
"""Its name while it was thought to hold pictures only."""

__all__ = [
    "AmbiguousCurves",
    "Cifar10",
    "Cifar100",
    "ClassImages",
    "ClassSamples",
    "Clinc150",
    "Completion",
    "Draws",
    "EpisodeSpec",
    "Episodes",
    "FashionMnist",
    "FixedLabels",
    "Folder",
    "GaussianProcesses",
    "Glyphs",
    "Idx",
    "Kmnist",
    "Loader",
    "MiniImageNet",
    "Mnist",
    "Omniglot",
    "Pixels",
    "Sinusoids",
    "TaskSource",
    "Text",
    "download_omniglot",
    "load_tasks",
    "save_tasks",
]
