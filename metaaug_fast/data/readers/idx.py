"""MNIST's format (LeCun, Cortes, Burges 1998), in which EMNIST, Fashion-MNIST and KMNIST are published too."""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...checks import check_choice
from ..cache import expanded
from ..division import PARTS, apart, check_split, sizes_of_few
from ..download import fetch
from ..samples import ClassSamples

SPLITS = ("shuffled", "ordered")
PICTURES = 70_000
"""In each of the published data sets: 60,000 in the half `train`, 10,000 in the half `t10k`."""

_IMAGES = re.compile(r"(?P<set>.*?)(?P<half>train|t10k|test)?-?images[-.]idx3-ubyte(?:\.gz)?")
_UNSIGNED_BYTE = 8  # what the third byte of a file calls its type
_BLOCK = 1 << 20


class Idx(ClassSamples):
    """Grey pictures and their labels in idx files, as MNIST, EMNIST and others are published.

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

    Raises:
        FileNotFoundError, ValueError: a file is missing, or damaged; the message says what to do.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        splits: str = "shuffled",
        prefix: str = "",
        seed: int = 0,
    ) -> None:
        check_split(split)
        check_choice("splits", splits, SPLITS)
        folder = expanded(root)
        found = _images(folder, prefix)
        if not found:
            raise FileNotFoundError(f"{folder / f'{prefix}*images-idx3-ubyte'}, gzipped or not, is missing")
        if len(found) > 1:
            raise ValueError(f"{folder} holds several data sets, {', '.join(sorted(found))}; prefix=... picks one")
        (files,) = found.values()
        data = apart(_part(_joined(folder, files), split, splits, seed))
        super().__init__(data.samples, data.first, data.counts, data.names)


class Mnist(ClassSamples):
    """MNIST: ten handwritten digits, 70,000 pictures of 28 x 28 pixels, those of both published halves together.

    Args:
        root: folder with the four published files, gzipped or not.
        split: `"train"` (6 classes), `"validation"` (2), `"test"` (2) or `"all"`. With `"train"` there are tasks of up
            to 6 ways, to be judged on 2.
        splits: `"shuffled"`: the classes are shuffled by `seed` before they are divided; `"ordered"`: by their labels.
        seed: of the shuffle.
        download: fetch those of the files that are not there into `root`.

    Warns where the files hold fewer pictures than the published ones.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or damaged; the message says what to do.
        ConnectionError: the download failed.
    """

    # Its first address, yann.lecun.com/exdb/mnist, serves no files any more; the digests are those of the files it had.
    url: ClassVar[str] = "https://ossci-datasets.s3.amazonaws.com/mnist"
    digests: ClassVar[Mapping[str, str]] = {
        "train-images-idx3-ubyte.gz": "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    }

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        splits: str = "shuffled",
        seed: int = 0,
        download: bool = False,
    ) -> None:
        check_split(split)
        check_choice("splits", splits, SPLITS)
        folder = expanded(root)
        if download:
            for name, digest in self.digests.items():
                if not (folder / name.removesuffix(".gz")).exists():
                    fetch(f"{self.url}/{name}", folder / name, digest)
        files = _images(folder).get("", [])
        if not files:
            raise FileNotFoundError(
                f"{folder / 'train-images-idx3-ubyte'}, gzipped or not, is missing; download=True fetches it"
            )
        data = _joined(folder, files)
        _warn_of_gaps(folder, files, len(data.samples))
        data = apart(_part(data, split, splits, seed))
        super().__init__(data.samples, data.first, data.counts, data.names)


class FashionMnist(Mnist):
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747): ten kinds of clothes, as MNIST has digits.

    Args:
        root: folder with the four published files, gzipped or not.
        split, splits, seed, download: as of `Mnist`.
    """

    url = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    digests: ClassVar[Mapping[str, str]] = {
        "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
    }


class Kmnist(Mnist):
    """KMNIST (Clanuwat et al. 2018, arXiv 1812.01718): ten handwritten characters of old Japanese, as MNIST has digits.

    Args:
        root: folder with the four published files, gzipped or not.
        split, splits, seed, download: as of `Mnist`.
    """

    url = "http://codh.rois.ac.jp/kmnist/dataset/kmnist"
    digests: ClassVar[Mapping[str, str]] = {
        "train-images-idx3-ubyte.gz": "md5:bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "md5:e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "md5:5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "md5:7320c461ea6c1c855c0b718fb2a4b134",
    }


def _images(root: Path, prefix: str = "") -> dict[str, list[Path]]:
    """The files of images, by the data set in front of their names; of a file that is gzipped and not, the latter."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(root.glob("*")):
        if (match := _IMAGES.fullmatch(path.name)) and path.name.startswith(prefix) and path.is_file():
            found.setdefault(match["set"], {}).setdefault(path.name.removesuffix(".gz"), path)
    return {name: [*files.values()] for name, files in found.items()}


def _joined(root: Path, files: Sequence[Path]) -> ClassSamples:
    """All pictures of these files, by class."""
    pairs = [_read_pair(path, _labels_of(path)) for path in files]
    shapes = sorted({images.shape[1:] for images, _ in pairs})
    if len(shapes) > 1:
        raise ValueError(f"{root} holds pictures of several sizes, {shapes}; take all files from one data set")
    images, labels = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return ClassSamples.from_arrays(images, labels)


def _part(data: ClassSamples, split: str, splits: str, seed: int) -> ClassSamples:
    if split == "all":
        return data
    sizes = sizes_of_few(len(data))
    if splits == "shuffled":
        return data.split_shares(sizes, seed)[split]
    ends = np.cumsum([0, *sizes.values()])
    return data.subset(range(ends[PARTS.index(split)], ends[PARTS.index(split) + 1]))


def _warn_of_gaps(root: Path, files: Sequence[Path], pictures: int) -> None:
    if pictures != PICTURES:
        names = " ".join(file.name.replace("test-", "t10k-") for file in files)
        missing = [half for half in ("train", "t10k") if f"{half}-" not in names]
        lacking = f"; it lacks {missing[0]}-images-idx3-ubyte" if missing else ""
        warnings.warn(f"{root} holds {pictures:,} of {PICTURES:,} published pictures{lacking}", stacklevel=3)


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
