"""Data as episodes: labelled images, function families, and the sampler that turns them into task batches."""

from .draws import Draws
from .episodes import Episodes
from .readers import Glyphs, Omniglot, Sinusoids, download_omniglot
from .samples import ClassImages
from .source import EpisodeSpec, TaskSource

__all__ = [
    "ClassImages",
    "Draws",
    "EpisodeSpec",
    "Episodes",
    "Glyphs",
    "Omniglot",
    "Sinusoids",
    "TaskSource",
    "download_omniglot",
]
