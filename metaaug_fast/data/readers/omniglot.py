"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1623 handwritten characters of 50 alphabets, drawn 20 times each."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ...checks import check_choice
from ..cache import Arrays, cached_arrays, expanded, file_digest
from ..division import PARTS, apart, check_split, named_classes
from ..download import fetch
from ..samples import ClassSamples

ARCHIVES = ("images_background", "images_evaluation")
URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
MD5 = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
# The papers' split of 1623 shuffled characters: 1200 to train on, 100 of them for validation in the MAML code, 423 to
# test.
SPLIT = {"train": 1100, "validation": 100, "test": 423}
SPLITS = ("papers", "vinyals", "background")
# Of the 964 characters of images_background, as many for validation as in `SPLIT`.
BACKGROUND = {"train": 864, "validation": 100}

# Characters in the published archives, each drawn 20 times.
CHARACTERS = {
    "images_background": 964,
    "images_evaluation": 659,
    "images_background_small1": 136,
    "images_background_small2": 156,
}
_DRAWINGS = 20

# What zipfile, zlib and Pillow raise over broken and encrypted files, and over pictures that no memory may hold.
_DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    SyntaxError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class Omniglot(ClassSamples):
    """Handwritten characters, 20 drawings a class; ink is 1, paper is 0, nothing in between.

    Args:
        root: folder with `images_background.zip` and `images_evaluation.zip`, or with these archives unpacked, in
            the official layout `<archive>/<alphabet>/<character>/<drawing>.png`.
        split: `"train"`, `"validation"`, `"test"` or `"all"`.
        rotations: every character also turned by 90, 180 and 270 degrees, as classes of their own. None: in
            training only.
        size: side of the images. Other sizes are reduced to the nearest pixel, as the MAML code does; smoother
            pictures make another task.
        download: fetch the two official archives into `root` if they are not there.
        archives: names of the archives to read, if not the two official ones: `("images_background_small1",)`.
        seed: of the shuffle.
        cache_dir: where decoded images are kept, see `cache.cache_folder`.
        splits: how characters are divided. `"papers"`: shuffled by `seed` into 1100, 100 and 423, of another number of
            characters into the same shares. `"vinyals"`: the 1028, 172 and 423 of Vinyals et al. 2016 (arXiv
            1606.04080). `"background"`: those of `images_background` shuffled by `seed` into 864 and 100, and all 659
            of `images_evaluation` to test.

    Warns of, and counts, what a published archive lacks (characters, drawings) and drawings that are no squares.

    Raises:
        FileNotFoundError, ValueError: an archive is missing, or damaged, or lacks characters that `splits` names; the
            message says what to do.
        ConnectionError: the download failed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        rotations: bool | None = None,
        size: int = 28,
        download: bool = False,
        archives: Sequence[str] = ARCHIVES,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
        splits: str = "papers",
    ) -> None:
        check_split(split)
        check_choice("splits", splits, SPLITS)
        if splits == "background" and sorted(archives) != sorted(ARCHIVES):
            raise ValueError(f"splits must be papers or vinyals where archives are not {ARCHIVES} (got {splits!r})")
        if size < 1:
            raise ValueError(f"size must be >= 1 (got {size})")
        folder = expanded(root)
        if download:
            download_omniglot(folder)
        sources = [_find(folder, name) for name in archives]
        made_from = [size, file_digest(Path(__file__)), *map(_fingerprint, sources)]
        stored = cached_arrays("omniglot", made_from, lambda: _read(sources, size), cache_dir, names=_STORED)
        _warn_of_gaps(sources, size, stored)
        names, counts = stored["names"].tolist(), stored["counts"]
        images = torch.from_numpy(np.unpackbits(stored["packed"], axis=1, count=size * size) * np.uint8(255))
        data = ClassSamples(images.view(-1, size, size), np.cumsum(counts) - counts, counts[:, None], names)
        if split != "all":
            if splits == "papers":
                data = data.split_shares(SPLIT, seed)[split]
            elif splits == "vinyals":
                data = named_classes(data, vinyals_characters()[split], splits, str(folder))
            else:
                archive = "images_evaluation" if split == "test" else "images_background"
                data = data.subset(np.flatnonzero(stored["origins"] == list(archives).index(archive)))
                data = data if split == "test" else data.split_shares(BACKGROUND, seed)[split]
        if rotations or (rotations is None and split == "train"):
            data = data.with_rotations()
        data = apart(data)
        super().__init__(data.samples, data.first, data.counts, data.names)


def vinyals_characters() -> dict[str, list[str]]:
    """The characters in each part of Vinyals' division, `<alphabet>/character<number>`.

    >>> {part: len(names) for part, names in vinyals_characters().items()}
    {'train': 1028, 'validation': 172, 'test': 423}
    """
    lists = json.loads(Path(__file__).with_name("omniglot_vinyals.json").read_text(encoding="utf-8"))
    return {
        part: [f"{alphabet}/character{number:02}" for alphabet, numbers in lists[part].items() for number in numbers]
        for part in PARTS
    }


def download_omniglot(root: str | os.PathLike[str], url: str = URL, md5: Mapping[str, str] = MD5) -> None:
    """Fetch the archives that `root` lacks, with a progress bar, and check their digests.

    Args:
        url: the folder they lie in.
        md5: the archives' names and digests.

    Raises:
        ConnectionError: the transfer failed, or what came has another digest; nothing is left behind.
    """
    folder = expanded(root)
    for name, digest in md5.items():
        if not any(_drawings(folder / Path(name).stem)):
            fetch(f"{url}/{name}", folder / name, f"md5:{digest}")


def _find(root: Path, name: str) -> Path:
    """The folder or the zip of an archive; a folder without drawings only where there is no zip."""
    folder, packed = root / name, root / f"{name}.zip"
    if packed.is_file() and not any(_drawings(folder)):
        return packed
    if folder.is_dir():
        return folder
    raise FileNotFoundError(
        f"{root / name}.zip is missing, and there is no folder {root / name}; Omniglot(root, download=True) "
        "fetches the official archives, archives=(...) reads others"
    )


def _fingerprint(source: Path) -> tuple[object, ...]:
    """What tells one state of an archive from another without reading it."""
    files = sorted(_drawings(source)) if source.is_dir() else [source]
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.relative_to(source)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return str(source.resolve()), digest.hexdigest()


def _drawings(folder: Path) -> Iterator[Path]:
    """The drawings of an unpacked archive; `._x.png` is what macOS notes beside a file on a foreign disk."""
    return (file for file in folder.glob("*/*/*.png") if not file.name.startswith("._"))


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """The drawings of an archive, `<alphabet>/<character>/<drawing>.png`, with their contents."""
    if source.is_dir():
        for file in _drawings(source):
            yield file.relative_to(source).as_posix(), file.read_bytes()
        return
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            parts = name.split("/")
            if name.startswith("/") or ".." in parts:
                raise ValueError(f"its member {name!r} leaves the folder")
            if len(parts) == 4 and name.endswith(".png") and not parts[3].startswith("._"):
                yield "/".join(parts[1:]), archive.read(name)


_STORED = ("packed", "counts", "names", "origins", "found", "squeezed")


def _read(sources: Sequence[Path], size: int) -> Arrays:
    """Decode all drawings; a class in two archives counts once.

    packed: ink in bits `[N, ...]`, class after class. counts, names: of the classes. origins: which source each class
    comes from. found: for every source, how many characters it holds and how many of them have fewer drawings than the
    published 20, `[sources, 2]`. squeezed: width and height of every drawing that is no square, `[..., 2]`.
    """
    classes: dict[str, dict[str, np.ndarray]] = {}
    origins: dict[str, int] = {}
    holdings: list[tuple[int, int]] = []
    squeezed: list[tuple[int, int]] = []
    for place, source in enumerate(sources):
        found: dict[str, dict[str, np.ndarray]] = {}
        name = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                for name, content in _files(source):
                    character, _, drawing = name.rpartition("/")
                    found.setdefault(character, {})[drawing], (width, height) = _ink(content, size)
                    if width != height:
                        squeezed.append((width, height))
        except _DAMAGE as error:
            raise ValueError(
                f"{source} cannot be read, at or after {name or 'its beginning'} ({error}); if it is damaged, delete "
                "it and run Omniglot(root, download=True), or put a good copy in its place"
            ) from error
        if not found:
            raise ValueError(f"{source} holds no <alphabet>/<character>/<drawing>.png; is it an Omniglot archive?")
        holdings.append((len(found), sum(len(drawings) < _DRAWINGS for drawings in found.values())))
        for character, drawings in found.items():
            classes.setdefault(character, drawings)
            origins.setdefault(character, place)
    names = sorted(classes)
    ink = [classes[name][drawing].reshape(-1) for name in names for drawing in sorted(classes[name])]
    return {
        "packed": np.packbits(ink, axis=1),
        "counts": np.array([len(classes[name]) for name in names]),
        "names": np.array(names),
        "origins": np.array([origins[name] for name in names]),
        "found": np.array(holdings),
        "squeezed": np.array(squeezed).reshape(-1, 2),
    }


def _ink(content: bytes, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Ink, bool `[size, size]`, and the width and height that the picture had."""
    image = Image.open(io.BytesIO(content)).convert("1", dither=Image.Dither.NONE)
    return ~np.asarray(image.resize((size, size), Image.Resampling.NEAREST)), image.size


def _warn_of_gaps(sources: Sequence[Path], size: int, stored: Arrays) -> None:
    said = []
    for source, (found, short) in zip(sources, stored["found"].tolist(), strict=True):
        published = CHARACTERS.get(source.name.removesuffix(".zip"), 0)
        if found < published:
            said.append(
                f"{source}: {published - found} of {published} characters are missing, so splits are not the papers'"
            )
        if published and short:
            said.append(f"{source}: {short} of {found} characters have fewer than {_DRAWINGS} drawings")
    if len(squeezed := stored["squeezed"]):
        width, height = squeezed[0].tolist()
        said.append(
            f"{', '.join(map(str, sources))}: {len(squeezed)} of {stored['counts'].sum()} drawings are no squares and "
            f"are squeezed into {size} x {size} pixels (the first had {width} x {height})"
        )
    for text in said:
        warnings.warn(text, stacklevel=3)
