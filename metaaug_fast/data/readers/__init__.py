"""One file a format or a data set.

A reader is a class whose objects tasks can be drawn from. Its constructor's arguments are the fields of a run's
`data` section; `split` is given by the run.
"""

from .glyphs import Glyphs
from .omniglot import Omniglot, download_omniglot
from .sinusoid import Sinusoids

READERS = {"glyphs": Glyphs, "omniglot": Omniglot, "sinusoid": Sinusoids}
"""The names by which a run knows them."""

__all__ = ["Glyphs", "Omniglot", "Sinusoids", "download_omniglot"]
