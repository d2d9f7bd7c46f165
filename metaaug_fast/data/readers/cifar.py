"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 60,000 colour pictures of 32 x 32 pixels."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from ...checks import check_choice
from ..cache import expanded
from ..division import PARTS, SHARES, apart, check_split, named_classes, sizes_of_few
from ..download import fetch
from ..samples import ClassSamples

URL = "https://www.cs.toronto.edu/~kriz"
DIGESTS = {
    "cifar-10-python.tar.gz": "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    "cifar-100-python.tar.gz": "sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
}

PICTURES = 60_000
"""In each of the two published data sets."""

SHAPE = (3, 32, 32)
CIFAR100_SPLITS = ("cifar_fs", "fc100", "shuffled")

_BYTES = 3 * 32 * 32
_LARGEST = 1 << 28  # the largest published file has 155 MB

Parsed = tuple[np.ndarray, np.ndarray]  # pictures [N, 3072] and labels [N], uint8


@dataclass(frozen=True)
class _Form:
    """A form in which a data set is published: an archive of one folder of files, each of them parsed by itself."""

    archive: str
    folder: str
    files: tuple[str, ...]
    meta: str
    parse: Callable[[bytes], Parsed]
    names: Callable[[bytes], list[str]]


class Cifar10(ClassSamples):
    """CIFAR-10: ten classes of 6,000 pictures, all six published batches together.

    Reading takes about a second from a packed archive, less from files, which a cache would not make shorter.

    Args:
        root: folder with `cifar-10-binary.tar.gz` or `cifar-10-python.tar.gz`, or with one of them unpacked, as
            `cifar-10-batches-bin` or `cifar-10-batches-py`. Pickles of the latter cannot run anything.
        split: `"train"` (6 classes), `"validation"` (2), `"test"` (2), shuffled by `seed`, or `"all"`. With `"train"`
            there are tasks of up to 6 ways, to be judged on 2.
        seed: of the shuffle.
        download: fetch `cifar-10-python.tar.gz` into `root` if there is none of these.

    Warns where the archive holds fewer pictures than the published one.

    Raises:
        FileNotFoundError, ValueError: the archive is missing, or damaged; the message says what to do.
        ConnectionError: the download failed.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str = "train", seed: int = 0, download: bool = False
    ) -> None:
        check_split(split)
        data, _ = _read(expanded(root), CIFAR10, 10, download)
        if split != "all":
            data = data.split_shares(sizes_of_few(len(data)), seed)[split]
        data = apart(data)
        super().__init__(data.samples, data.first, data.counts, data.names)


class Cifar100(ClassSamples):
    """CIFAR-100: a hundred classes of 600 pictures; with its default splits CIFAR-FS.

    Reading takes about a second from a packed archive, less from files, which a cache would not make shorter.

    Args:
        root: folder with `cifar-100-binary.tar.gz` or `cifar-100-python.tar.gz`, or with one of them unpacked, as
            `cifar-100-binary` or `cifar-100-python`. Pickles of the latter cannot run anything.
        split: `"train"`, `"validation"`, `"test"` or `"all"`.
        splits: `"cifar_fs"`: the 64, 16 and 20 classes of Bertinetto et al. (arXiv 1805.08136); `"fc100"`: the 60, 20
            and 20 of Oreshkin et al. 2018, which share no coarse class; `"shuffled"`: 64, 16 and 20 by `seed`.
        seed: of that shuffle.
        download: fetch `cifar-100-python.tar.gz` into `root` if there is none of these.

    Warns where the archive holds fewer pictures than the published one.

    Raises:
        FileNotFoundError, ValueError: the archive is missing, or damaged, or lacks classes; the message says what to
            do.
        ConnectionError: the download failed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        splits: str = "cifar_fs",
        seed: int = 0,
        download: bool = False,
    ) -> None:
        check_split(split)
        check_choice("splits", splits, CIFAR100_SPLITS)
        data, source = _read(expanded(root), CIFAR100, 100, download)
        if split != "all" and splits == "shuffled":
            data = data.split_shares(SHARES, seed)[split]
        elif split != "all":
            data = named_classes(data, cifar100_classes(splits)[split], splits, str(source))
        data = apart(data)
        super().__init__(data.samples, data.first, data.counts, data.names)


def cifar100_classes(splits: str) -> dict[str, list[str]]:
    """The names of the classes in each part of `"cifar_fs"` or `"fc100"`.

    >>> {part: len(names) for part, names in cifar100_classes("fc100").items()}
    {'train': 60, 'validation': 20, 'test': 20}
    """
    lists = json.loads(Path(__file__).with_name("cifar100_splits.json").read_text())
    return {part: lists[splits][part] for part in PARTS}


def _read(root: Path, forms: Sequence[_Form], classes: int, download: bool) -> tuple[ClassSamples, Path]:
    """All pictures, by class, and what they were read from."""
    if download and not any((root / name).exists() for form in forms for name in (form.archive, form.folder)):
        name = forms[-1].archive
        fetch(f"{URL}/{name}", root / name, DIGESTS[name])
    source, form = _find(root, forms)
    try:
        contents = _folder(source, form) if source.is_dir() else _archive(source, form)
    except (OSError, EOFError, ValueError, MemoryError, OverflowError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{source} cannot be read ({error}); put a good copy in its place") from error
    parsed = [_parsed(source, name, contents[name], form.parse) for name in form.files if name in contents]
    if not parsed:
        raise ValueError(f"{source} holds none of {', '.join(form.files)}; put a good copy in its place")
    pictures, labels = (np.concatenate(each) for each in zip(*parsed, strict=True))
    names = [str(label) for label in range(classes)]
    if form.meta in contents:
        names = _parsed(source, form.meta, contents[form.meta], form.names)
    if len(names) != classes or len(set(names)) != classes or labels.max() >= classes:
        raise ValueError(
            f"{source} must have {classes} classes (got {len(set(names))} names, labels up to {labels.max()}); "
            "put a good copy in its place"
        )
    _warn_of_gaps(source, form, contents, len(pictures))
    data = ClassSamples.from_arrays(pictures.reshape(-1, *SHAPE), labels)
    return ClassSamples(data.samples, data.first, data.counts, [names[int(label)] for label in data.names]), source


def _find(root: Path, forms: Sequence[_Form]) -> tuple[Path, _Form]:
    """The first form there is: unpacked before packed, for it is quicker to read."""
    for form in forms:
        if any((root / form.folder / name).is_file() for name in form.files):
            return root / form.folder, form
    for form in forms:
        if (root / form.archive).is_file():
            return root / form.archive, form
    raise FileNotFoundError(
        f"{root / forms[0].archive} is missing, as are {' and '.join(form.archive for form in forms[1:])} and "
        f"the folders {' and '.join(form.folder for form in forms)}; download=True fetches one"
    )


def _folder(source: Path, form: _Form) -> dict[str, bytes]:
    paths = {name: source / name for name in (*form.files, form.meta)}
    contents = {}
    for name, path in paths.items():
        if path.is_file():
            _check_size(name, path.stat().st_size)
            contents[name] = path.read_bytes()
    return contents


def _archive(source: Path, form: _Form) -> dict[str, bytes]:
    """The files in an archive, read without unpacking it."""
    contents = {}
    with gzip.open(source) as stream:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"its member {member.name!r} leaves the folder")
                if path.parent != PurePosixPath(form.folder) or path.name not in (*form.files, form.meta):
                    continue
                if not member.isreg():
                    raise ValueError(f"its member {member.name!r} is no plain file")
                _check_size(member.name, member.size)
                file = archive.extractfile(member)
                assert file is not None  # of a plain file
                contents[path.name] = file.read()
                if len(contents[path.name]) != member.size:
                    raise ValueError(f"its member {member.name!r} is cut off")
        # The checksum stands at the end.
        while stream.read(1 << 20):
            pass
    return contents


def _check_size(name: str, size: int) -> None:
    if size > _LARGEST:
        raise ValueError(f"{name!r} has {size} bytes, more than any published file")


def _parsed(source: Path, name: str, content: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(content)
    except ValueError as error:
        raise ValueError(f"{source}: {name} cannot be read ({error}); put a good copy in its place") from error


def _warn_of_gaps(source: Path, form: _Form, contents: Mapping[str, bytes], pictures: int) -> None:
    if pictures != PICTURES:
        missing = [name for name in form.files if name not in contents]
        lacking = f"; it lacks {', '.join(missing)}" if missing else ""
        warnings.warn(f"{source} holds {pictures:,} of {PICTURES:,} published pictures{lacking}", stacklevel=4)


def _records(label_bytes: int) -> Callable[[bytes], Parsed]:
    """Reads records of one label, or of a coarse and a fine one, and the red, green and blue plane of a picture."""

    def parse(content: bytes) -> Parsed:
        size = label_bytes + _BYTES
        if not content or len(content) % size:
            raise ValueError(f"it must be records of {size} bytes (got {len(content)} bytes)")
        records = np.frombuffer(content, np.uint8).reshape(-1, size)
        return records[:, label_bytes:], records[:, label_bytes - 1]

    return parse


def _lines(content: bytes) -> list[str]:
    return content.decode().split()


def _batch(key: bytes) -> Callable[[bytes], Parsed]:
    """Reads a pickled dict of `data`, uint8 `[N, 3072]`, and a list of labels under `key`."""

    def parse(content: bytes) -> Parsed:
        batch = _unpickled(content, (b"data", key))
        pictures, labels = _array(batch[b"data"]), batch[key]
        if not isinstance(labels, list) or not all(type(each) is int and 0 <= each < 256 for each in labels):
            raise ValueError(f"its {key.decode()} must be a list of labels")
        if len(labels) != len(pictures):
            raise ValueError(f"it has {len(labels)} labels for {len(pictures)} pictures")
        return pictures, np.array(labels, np.uint8)

    return parse


def _pickled_names(key: bytes) -> Callable[[bytes], list[str]]:
    def parse(content: bytes) -> list[str]:
        names = _unpickled(content, (key,))[key]
        if not isinstance(names, list) or not all(isinstance(each, (bytes, str)) for each in names):
            raise ValueError(f"its {key.decode()} must be a list of names")
        return [each.decode() if isinstance(each, bytes) else each for each in names]

    return parse


# What pickles of arrays and of bytes name, by numpy of any age and by Python 3 in an old protocol. None of it is
# called: what would be called is written down, and read by `_array`.
_RECONSTRUCT = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
_FROM_BUFFER = {f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")}
_ENCODE = "_codecs.encode"
_ADMITTED = {*_RECONSTRUCT, *_FROM_BUFFER, _ENCODE, "numpy.ndarray", "numpy.dtype"}


_InPython: Any = pickle._Unpickler


class _Unpickler(_InPython):
    """Of lists, dicts, bytes, strings, numbers and arrays; a pickle can make it call nothing else.

    The one in Python: that in C takes as much memory as a damaged index or length asks for, and the process dies.
    """

    dispatch: ClassVar[dict[int, Any]] = {**_InPython.dispatch}

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and only arrays, lists, dicts and text are read")
        return _Named(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"it names the extension {code}, and only arrays, lists, dicts and text are read")

    def load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


class _Named:
    """Stands for a function that a pickle names."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        if self.name == _ENCODE:
            text, encoding = arguments
            if encoding not in ("latin1", b"latin1"):
                raise ValueError("it has bytes in an encoding other than latin1")
            return text.encode("latin1")
        return _Called(self.name, arguments)


class _Called:
    """Stands for what such a function would give, with the state that the pickle sets afterwards."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _unpickled(content: bytes, keys: Iterable[bytes]) -> dict[bytes, Any]:
    try:
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # damage can raise anything, and the remedy is always the same
        raise ValueError(str(error) or type(error).__name__) from error
    if isinstance(found, dict):
        found = {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}
    if not isinstance(found, dict) or not all(key in found for key in keys):
        raise ValueError(f"it must be a dict with {' and '.join(key.decode() for key in keys)}")
    return found


def _array(value: Any) -> np.ndarray:
    """Pictures, uint8 `[N, 3072]`, from an array as a pickle has it."""
    match value:
        case _Called(name=name, state=(_, shape, dtype, fortran, content)) if name in _RECONSTRUCT:
            in_rows = not fortran
        case _Called(name=name, arguments=(content, dtype, shape, order)) if name in _FROM_BUFFER:
            in_rows = order in ("C", b"C")
        case _:
            raise ValueError("its data must be an array")
    match dtype:
        case _Called(name="numpy.dtype", arguments=(kind, *_)) if kind in ("u1", b"u1", "|u1", b"|u1"):
            pass
        case _:
            raise ValueError("its data must be an array of uint8")
    if not isinstance(content, (bytes, bytearray)) or not in_rows:
        raise ValueError("its data must be an array in rows")
    if not content or shape != (len(content) // _BYTES, _BYTES) or len(content) % _BYTES:
        raise ValueError(f"its data must be [N, {_BYTES}] (got {len(content)} bytes)")
    return np.frombuffer(content, np.uint8).reshape(-1, _BYTES)


_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
CIFAR10 = (
    _Form(
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        tuple(f"{name}.bin" for name in _BATCHES),
        "batches.meta.txt",
        _records(1),
        _lines,
    ),
    _Form(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        _BATCHES,
        "batches.meta",
        _batch(b"labels"),
        _pickled_names(b"label_names"),
    ),
)
CIFAR100 = (
    _Form(
        "cifar-100-binary.tar.gz",
        "cifar-100-binary",
        ("train.bin", "test.bin"),
        "fine_label_names.txt",
        _records(2),
        _lines,
    ),
    _Form(
        "cifar-100-python.tar.gz",
        "cifar-100-python",
        ("train", "test"),
        "meta",
        _batch(b"fine_labels"),
        _pickled_names(b"fine_label_names"),
    ),
)
