"""Pictures of one's own: a folder with a folder for each class."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from PIL import Image

from ...checks import check_choice, check_integer
from .. import pictures
from ..cache import Arrays, cached_samples, expanded, file_digest
from ..division import check_split, part_of
from ..mapped import Rows
from ..pictures import DAMAGE, SUFFIXES, array, decoded, extent, resized
from ..samples import ClassSamples

PARTS: Mapping[str, tuple[str, ...]] = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
"""Names of the folders that the classes of a part lie in, where somebody has divided them."""

_STORED = ("counts", "names", "parts", "damaged", "squeezed")


class Folder(ClassSamples):
    """Pictures in a folder for each class: PNG, JPEG, BMP, GIF (the first frame) and WebP; other files are ignored.

    Where `root` has the folders `train`, `validation` (or `val`) and `test`, whose folders are the classes, these are
    the parts. Otherwise the folders of `root` are the classes, which are shuffled by `seed` and divided 64 : 16 : 20.
    A class goes by the name of its folder. Files and folders whose names begin with a dot are ignored.

    Pictures are turned as their EXIF data say, what is transparent is laid on white, and 16 bits are reduced to 8.

    Args:
        root: folder `<class>/<picture>`, or `train/<class>/<picture>` and so on.
        split: `"train"`, `"validation"`, `"test"` or `"all"`.
        size: height and width that pictures are brought to (bilinear; to half or less by means of boxes). None: all
            pictures must have one size, and are as they are.
        damaged: `"refuse"` a picture that cannot be read, or `"skip"` it, with a warning that counts.
        channels: 1 (grey) or 3. None: 1 if all pictures are grey, else 3.
        seed: of the shuffle of classes, where `root` is not divided.
        cache_dir: where decoded pictures are kept, see `cache.cache_folder`; they are mapped from there, not read, so
            that there may be more than memory holds.

    Warns of, and counts, pictures that are skipped or squeezed, and classes of one name in two parts.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is missing, or is no folder.
        ValueError: an argument is out of range; a picture cannot be read or has another size; a part has fewer than two
            classes, or a class fewer than two pictures.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (root / name).mkdir()
    ...     for number in range(3):
    ...         Image.new("L", (9, 8)).save(root / name / f"{number}.png")
    >>> Folder(root, "all", cache_dir=root / "cache")
    Folder(2 classes, 3 to 3 samples each of shape (1, 8, 9))
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        size: int | None = None,
        damaged: Literal["refuse", "skip"] = "refuse",
        channels: Literal[1, 3] | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        check_split(split)
        check_choice("damaged", damaged, ("refuse", "skip"))
        check_integer("seed", seed)
        if size is not None:
            check_integer("size", size, low=1)
        if channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1, 3 or None (got {channels!r})")
        folder = expanded(root)
        divided, classes = _find(folder)
        code = [file_digest(Path(each)) for each in (__file__, pictures.__file__)]
        made_from = [size, damaged, channels, PIL.__version__, *code, *_state(folder, classes)]
        samples, stored = cached_samples(
            "folder", made_from, lambda rows: _read(rows, classes, size, damaged, channels), cache_dir, names=_STORED
        )
        _warn(folder, size, stored)
        counts, names, parts = stored["counts"], stored["names"], stored["parts"]
        data = ClassSamples(samples, np.cumsum(counts) - counts, counts[:, None], names.tolist())
        if split != "all" and divided:
            data = data.subset(np.flatnonzero(parts == split))
            if not len(data):
                raise ValueError(
                    f"{folder} must have a folder {' or '.join(PARTS[split])}, as it has {' and '.join(_unique(parts))}"
                )
        elif split != "all":
            data = part_of(data, split, seed)
        super().__init__(samples, data.first, data.counts, data.names)


Classes = dict[tuple[str, str], Sequence[Path]]
"""The pictures of each class, by its part (empty where the folder is not divided) and its name."""


def _find(root: Path) -> tuple[bool, Classes]:
    """Whether `root` is divided into parts, and its classes in order of their names."""
    if not root.exists():
        raise FileNotFoundError(f"{root} is missing; root must be a folder with a folder for each class")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no folder; root must be a folder with a folder for each class")
    parts = {}
    for part, names in PARTS.items():
        found = [root / name for name in names if (root / name).is_dir()]
        if len(found) > 1:
            raise ValueError(f"{root} must have one folder of {part} classes (got {' and '.join(names)})")
        if found:
            parts[part] = found[0]
    # A class may be called train: then there are no folders in it.
    divided = "train" in parts and len(parts) > 1 and any(_folders(parts["train"]))
    classes: Classes = {}
    for part, folder in parts.items() if divided else [("", root)]:
        folders = _folders(folder)
        for each in folders:
            classes[part, each.name] = _pictures(each)
        if not any(classes[part, each.name] for each in folders):
            raise ValueError(
                f"{folder} must hold <class>/<picture>{'|'.join(SUFFIXES)} (got no picture in a folder of its class)"
            )
        if len(folders) < 2:
            raise ValueError(f"{folder} must have a folder for each of two classes or more (got {folders[0].name!r})")
    return divided, classes


def _folders(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        each
        for each in folder.iterdir()
        if each.suffix.lower() in SUFFIXES and not each.name.startswith(".") and each.is_file()
    )


def _state(root: Path, classes: Classes) -> tuple[str, str]:
    """What tells one state of a folder from another without reading its pictures."""
    digest = hashlib.sha256()
    for name, files in classes.items():
        digest.update(f"{name}\n".encode(errors="surrogateescape"))
        for file in files:
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return str(root.resolve()), digest.hexdigest()


def _read(rows: Rows, classes: Classes, size: int | None, damaged: str, channels: int | None) -> Arrays:
    """Decode all pictures into `rows`, uint8 `[channels, H, W]`, class after class.

    counts, names, parts: of the classes. damaged: a sentence for each picture left out. squeezed: width and height of
    those that were no squares and are, `[..., 2]`.
    """
    counts = []
    left_out: list[str] = []
    squeezed = []
    first: Path | None = None
    depth = channels or 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for (_, name), files in classes.items():
            before = len(rows)
            for file in files:
                content = file.read_bytes()
                try:
                    image = decoded(content, channels)
                except DAMAGE as error:
                    reason = f"{file} cannot be read ({str(error) or type(error).__name__})"
                    if damaged == "refuse":
                        raise ValueError(f'{reason}; replace or delete it, or give damaged="skip"') from error
                    left_out.append(reason)
                    continue
                if size is not None:
                    if image.width != image.height:
                        squeezed.append(image.size)
                    image = resized(image, size)
                pixels = array(image)
                if first is None:
                    first, shown = file, extent(pixels)
                elif extent(pixels) != shown:
                    raise ValueError(
                        "pictures must have one size unless size says which (got "
                        f"{first} with {shown} and {file} with {extent(pixels)} pixels); give size=N"
                    )
                if len(pixels) > depth:  # the first in colour: those before become so, too
                    rows.clear()
                    return _read(rows, classes, size, damaged, 3)
                rows.append(np.broadcast_to(pixels, (depth, *pixels.shape[1:])))
            counts.append(len(rows) - before)
            if counts[-1] < 2:
                raise ValueError(
                    f"a class must have two pictures or more that can be read (got {counts[-1]} of {name!r}); "
                    "add some, or remove its folder"
                )
    return {
        "counts": np.array(counts),
        "names": np.array([name for _, name in classes]),
        "parts": np.array([part for part, _ in classes]),
        "damaged": np.array(left_out, dtype=str),
        "squeezed": np.array(squeezed, dtype=np.int64).reshape(-1, 2),
    }


def _unique(parts: np.ndarray) -> list[str]:
    return [part for part in PARTS if part in parts.tolist()]


def _warn(root: Path, size: int | None, stored: Arrays) -> None:
    said = []
    total = stored["counts"].sum()
    if len(damaged := stored["damaged"]):
        said.append(f"{root}: {len(damaged)} of {total + len(damaged)} pictures are skipped; the first: {damaged[0]}")
    if len(squeezed := stored["squeezed"]):
        width, height = squeezed[0].tolist()
        said.append(
            f"{root}: {len(squeezed)} of {total} pictures are no squares and are squeezed into {size} x {size} pixels "
            f"(the first had {width} x {height})"
        )
    names, times = np.unique(stored["names"], return_counts=True)
    if (times > 1).any():
        said.append(
            f"{root}: {(times > 1).sum()} of {len(names)} classes, such as {str(names[times.argmax()])!r}, are in more "
            "than one part, so a test may know what training has seen"
        )
    for text in said:
        warnings.warn(text, stacklevel=3)
