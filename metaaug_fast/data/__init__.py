"""Data as episodes: labelled images, function families, and the sampler that turns them into task batches."""

from .draws import Draws
from .episodes import Episodes, Loader
from .fixed import load_tasks, save_tasks
from .readers import Glyphs, Omniglot, Sinusoids, download_omniglot
from .samples import ClassSamples
from .source import EpisodeSpec, TaskSource

ClassImages = ClassSamples
"""Its name while it was thought to hold pictures only."""

__all__ = [
    "ClassImages",
    "ClassSamples",
    "Draws",
    "EpisodeSpec",
    "Episodes",
    "Glyphs",
    "Loader",
    "Omniglot",
    "Sinusoids",
    "TaskSource",
    "download_omniglot",
    "load_tasks",
    "save_tasks",
]
