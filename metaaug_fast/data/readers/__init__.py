"""One file a format or a data set.

A reader is a class whose objects tasks can be drawn from. Its constructor's arguments are the fields of a run's
`data` section; `split` is given by the run.
"""

from .ambiguous import AmbiguousCurves
from .cifar import Cifar10, Cifar100
from .clinc150 import Clinc150
from .folder import Folder
from .gaussian_process import GaussianProcesses
from .glyphs import Glyphs
from .idx import FashionMnist, Idx, Kmnist, Mnist
from .mini_imagenet import MiniImageNet
from .omniglot import Omniglot, download_omniglot
from .sinusoid import Sinusoids
from .text import Text

READERS = {
    "ambiguous": AmbiguousCurves,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "glyphs": Glyphs,
    "fashion_mnist": FashionMnist,
    "idx": Idx,
    "kmnist": Kmnist,
    "mnist": Mnist,
    "clinc150": Clinc150,
    "csv": Text,
    "folder": Folder,
    "gp": GaussianProcesses,
    "mini_imagenet": MiniImageNet,
    "omniglot": Omniglot,
    "sinusoid": Sinusoids,
}
"""Their names in a run."""

__all__ = [
    "AmbiguousCurves",
    "Cifar10",
    "Cifar100",
    "Clinc150",
    "FashionMnist",
    "Folder",
    "GaussianProcesses",
    "Glyphs",
    "Idx",
    "Kmnist",
    "MiniImageNet",
    "Mnist",
    "Omniglot",
    "Sinusoids",
    "Text",
    "download_omniglot",
]
