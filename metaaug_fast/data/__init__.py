"""Data as episodes: labelled images, function families, and the sampler that turns them into task batches."""

from .draws import Draws
from .episodes import Episodes, EpisodeSpec, TaskSource
from .glyphs import Glyphs
from .images import ClassImages
from .omniglot import Omniglot, download_omniglot
from .sinusoid import Sinusoids

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
