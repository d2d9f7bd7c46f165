"""Pictures of a known data set as tasks of regression, so that a run can name them."""

from __future__ import annotations

import inspect
import os

from ..checks import check_choice
from .pixels import Pixels
from .readers import READERS


class Completion(Pixels):
    """`Pixels` of the pictures of a data set that a run knows by name.

    Pictures are divided as that data set divides its classes, so those to be judged on are of unseen classes.

    Args:
        pictures: the data set's name, such as `"mnist"` or `"omniglot"`.
        root: its folder, where it has one.
        split: `"train"`, `"validation"`, `"test"` or `"all"`, as the data set has them.
        download: fetch what it lacks into `root`.

    Raises:
        TypeError: `root` is missing, or given to a data set without a folder, or likewise `download`.
        ValueError, OSError: no data set has that name, it holds no pictures `[C, H, W]`, or cannot be read.

    >>> from metaaug_fast.data import Completion, Episodes
    >>> tasks = next(Episodes(Completion("glyphs", split="test"), shots=10, queries=774, tasks=2))
    >>> tasks.support_x.shape, tasks.query_y.shape
    (torch.Size([2, 10, 2]), torch.Size([2, 774, 1]))
    """

    def __init__(
        self,
        pictures: str = "mnist",
        root: str | os.PathLike[str] | None = None,
        split: str = "train",
        download: bool = False,
    ) -> None:
        known = {name: inspect.signature(reader).parameters for name, reader in READERS.items()}
        check_choice("pictures", pictures, (name for name, takes in known.items() if "split" in takes))
        takes = known[pictures]
        given = {name: value for name, value in (("root", root), ("download", download)) if value}
        for name in given.keys() - takes.keys():
            raise TypeError(f"{name} must not be given: {pictures} takes none (got {given[name]!r})")
        if "root" in takes and root is None:
            raise TypeError(f"root must be the folder of {pictures} (got None)")
        super().__init__(READERS[pictures](split=split, **given))
