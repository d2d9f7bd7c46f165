"""MNIST's format (LeCun, Cortes, Burges 1998), in which EMNIST, Fashion-MNIST and KMNIST are published too."""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from ...checks import check_choice
from ..cache import expanded
from ..division import PARTS, check_split, sizes_of_few
from ..download import fetch
from ..samples import ClassSamples

SPLITS = ("shuffled", "ordered")
# Its first address, yann.lecun.com/exdb/mnist, serves no files any more; the digests are those of the files it had.
URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}

_IMAGES = re.compile(r"(?P<set>.*?)(?P<half>train|t10k|test)?-?images[-.]idx3-ubyte(?:\.gz)?")
_UNSIGNED_BYTE = 8  # what the third byte of a file calls its type
_BLOCK = 1 << 20


class Idx(ClassSamples):
    """Grey pictures and their labels in idx files: MNIST and what is published as MNIST is.

    Every pair of files `*images-idx3-ubyte` and `*labels-idx1-ubyte` in `root`, gzipped or not, is read, and the
    pictures of all pairs are joined by class: the published division into `train` and `t10k` (or `test`) is one of
    pictures, and tasks need one of classes. Pictures are as they lie in the file; EMNIST's are mirrored along their
    diagonal there.

    Args:
        root: folder with the files.
        split: `"train"` (60 % of the classes), `"validation"` (20 %), `"test"` (20 %), at least two classes each, or
            `"all"`. Of ten digits 6, 2 and 2: with `"train"` there are tasks of up to 6 ways, to be judged on 2.
        splits: `"shuffled"`: the classes are shuffled by `seed` before they are divided; `"ordered"`: by their labels.
        prefix: of the files to read, where `root` holds several data sets: `"emnist-balanced-"`.
        seed: of the shuffle.
        download: fetch the four files of MNIST into `root`, those that are not there.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or damaged; the message says what to do.
        ConnectionError: the download failed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        splits: str = "shuffled",
        prefix: str = "",
        seed: int = 0,
        download: bool = False,
    ) -> None:
        check_split(split)
        check_choice("splits", splits, SPLITS)
        folder = expanded(root)
        if download and prefix:
            raise ValueError(f"download must not be given with prefix: MNIST's files have none (got {prefix!r})")
        if download:
            for name, digest in SHA256.items():
                if not (folder / name.removesuffix(".gz")).exists():
                    fetch(f"{URL}/{name}", folder / name, digest)
        pairs = [_read_pair(images, labels) for images, labels in _pairs(folder, prefix)]
        shapes = sorted({images.shape[1:] for images, _ in pairs})
        if len(shapes) > 1:
            raise ValueError(f"{folder} holds pictures of several sizes, {shapes}; prefix=... picks one data set")
        images, labels = (np.concatenate(each) for each in zip(*pairs, strict=True))
        data = ClassSamples.from_arrays(images, labels)
        if split != "all":
            sizes = sizes_of_few(len(data))
            if splits == "shuffled":
                data = data.split_shares(sizes, seed)[split]
            else:
                ends = np.cumsum([0, *sizes.values()])
                data = data.subset(range(ends[PARTS.index(split)], ends[PARTS.index(split) + 1]))
        super().__init__(data.samples, data.first, data.counts, data.names)


def _pairs(root: Path, prefix: str) -> list[tuple[Path, Path]]:
    """The files of images and of labels; of a file that lies there gzipped and not, the latter."""
    found: dict[str, Path] = {}
    sets = set()
    for path in sorted(root.glob("*")):
        if (match := _IMAGES.fullmatch(path.name)) and path.name.startswith(prefix) and path.is_file():
            found.setdefault(path.name.removesuffix(".gz"), path)
            sets.add(match["set"])
    if not found:
        raise FileNotFoundError(
            f"{root / f'{prefix}*images-idx3-ubyte'}, gzipped or not, is missing; download=True fetches MNIST's"
        )
    if len(sets) > 1:
        raise ValueError(f"{root} holds several data sets, {', '.join(sorted(sets))}; prefix=... picks one")
    return [(path, _labels_of(path)) for path in found.values()]


def _labels_of(images: Path) -> Path:
    """The file of labels beside a file of images."""
    plain = re.sub(r"images([-.])idx3", r"labels\1idx1", images.name).removesuffix(".gz")
    for name in (plain, f"{plain}.gz"):
        if (path := images.with_name(name)).is_file():
            return path
    raise FileNotFoundError(f"{images.with_name(plain)}, gzipped or not, is missing; put it beside {images.name}")


def _read_pair(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    pictures, classes = _read(images, 3), _read(labels, 1)
    if len(pictures) != len(classes):
        raise ValueError(
            f"{labels} has {len(classes)} labels for the {len(pictures)} pictures of {images.name}; "
            "take both from one source"
        )
    return pictures, classes


def _read(path: Path, dims: int) -> np.ndarray:
    """An idx file: two zero bytes, the type, the number of dimensions, the sizes in 32 bits (big end first), data."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * dims)
            if header[:4] != bytes([0, 0, _UNSIGNED_BYTE, dims]) or len(header) < 4 + 4 * dims:
                raise ValueError(f"its header is not that of bytes in {dims} dimensions")
            shape = struct.unpack(f">{dims}I", header[4:])
            size = math.prod(shape)
            content = bytearray()
            # One byte too many shows that there are more. In blocks, for the header may promise anything.
            while len(content) <= size and (block := file.read(min(_BLOCK, size + 1 - len(content)))):
                content += block
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if len(content) != size:
        held = "more" if len(content) > size else f"{len(content)}"
        raise _damaged(path, f"its header promises {' x '.join(map(str, shape))} bytes, it holds {held}")
    if size == 0:
        raise _damaged(path, "it is empty")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} cannot be read ({reason}); put a good copy in its place")
