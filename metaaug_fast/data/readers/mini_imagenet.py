"""mini-ImageNet (Vinyals et al. 2016) as Ravi and Larochelle 2017 divide it: a hundred classes of 600 pictures."""

from __future__ import annotations

import csv
import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import numpy as np
import PIL
from PIL import Image

from ...checks import check_choice, check_integer
from .. import pictures
from ..cache import Arrays, cached_samples, expanded, file_digest
from ..division import PARTS, check_split
from ..mapped import Rows
from ..pictures import DAMAGE, array, decoded, resized
from ..samples import ClassSamples

FILES = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
PUBLISHED = {"train": 38_400, "validation": 9_600, "test": 12_000}
"""Pictures in each part: of 64, 16 and 20 classes."""

_COLUMNS = ("filename", "label")
_STORED = ("counts", "names", "damaged")
_LAYOUT = "train.csv, val.csv and test.csv (columns filename,label) beside a folder images/"


class MiniImageNet(ClassSamples):
    """mini-ImageNet, uint8 `[N, 3, size, size]`: 64 classes to train on, 16 to validate, 20 to test, of 600 pictures.

    There is no download, for it has no official address.
    Pictures that are no squares are squeezed into squares, as in the papers; grey ones have three equal channels.

    Args:
        root: folder with `train.csv`, `val.csv` and `test.csv` (columns `filename,label`), or with these in a folder
            `split/`, beside the pictures: `images/<filename>`, `images/<label>/<filename>` or `<label>/<filename>`.
            Only the files of the asked part must be there.
        split: `"train"`, `"validation"`, `"test"` or `"all"`.
        size: height and width that pictures are brought to (bilinear; to half or less by means of boxes).
        damaged: `"refuse"` a picture that cannot be read, or `"skip"` it, with a warning that counts.
        cache_dir: where decoded pictures are kept, see `cache.cache_folder`.

    Warns of, and counts, pictures that are skipped, and parts that have fewer than the published ones.

    Raises:
        FileNotFoundError: a csv file is missing, or pictures that it names.
        ValueError: an argument is out of range; a csv file is none, or names what lies outside `root`; a class is in
            two parts, or has fewer than two pictures; a picture cannot be read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        size: int = 84,
        damaged: Literal["refuse", "skip"] = "refuse",
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        check_split(split)
        check_integer("size", size, low=1)
        check_choice("damaged", damaged, ("refuse", "skip"))
        folder = expanded(root)
        asked = PARTS if split == "all" else (split,)
        # Those of other parts too, where there are any: they may have no class of this one.
        rows = {part: _rows(path) for part in PARTS if (path := _csv(folder, part, part in asked))}
        _check_apart(rows)
        wanted = [row for part in asked for row in rows[part]]
        files = _located(folder, wanted)
        code = [file_digest(Path(each)) for each in (__file__, pictures.__file__)]
        made_from = [size, damaged, PIL.__version__, *code, *_state(folder, wanted, files)]
        samples, stored = cached_samples(
            "mini_imagenet", made_from, lambda kept: _read(kept, wanted, files, size, damaged), cache_dir, names=_STORED
        )
        _warn({part: rows[part] for part in asked}, stored["damaged"].tolist())
        sizes = stored["counts"]
        super().__init__(samples, np.cumsum(sizes) - sizes, sizes[:, None], stored["names"].tolist())


@dataclass(frozen=True)
class _Row:
    """A picture that line `line` of the file `source` names."""

    label: str
    line: int
    filename: str
    source: Path

    @property
    def where(self) -> str:
        return f"line {self.line} of {self.source}"


def _csv(root: Path, part: str, asked: bool) -> Path | None:
    """The file of a part; None if there is none and nobody asked for it."""
    for path in (root / FILES[part], root / "split" / FILES[part]):
        if path.is_file():
            return path
    if asked:
        raise FileNotFoundError(f"{root / FILES[part]} is missing; root must hold {_LAYOUT}")
    return None


def _rows(path: Path) -> list[_Row]:
    """What a csv file names, class after class."""
    rows: dict[str, _Row] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [each.strip() for each in next(reader, [])]
            if any(header.count(each) != 1 for each in _COLUMNS):
                raise ValueError(f"line 1 of {path} must name the columns filename,label (got {','.join(header)!r})")
            for values in filter(None, reader):
                if len(values) != len(header):
                    raise ValueError(
                        f"line {reader.line_num} of {path} must have {len(header)} columns as the first "
                        f"(got {len(values)})"
                    )
                filename, label = (values[header.index(each)].strip() for each in _COLUMNS)
                row = _Row(label, reader.line_num, filename, path)
                for name, value in (("filename", filename), ("label", label)):
                    if not value or value.lower() == "nan" or _leaves(value):
                        raise ValueError(f"{row.where} must have a {name} within the folder (got {value!r})")
                if filename in rows:
                    raise ValueError(
                        f"{row.where} must name another picture than line {rows[filename].line} (got {filename!r})"
                    )
                rows[filename] = row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} cannot be read after line {reader.line_num}: it must be csv in UTF-8 ({error})"
            ) from error
    ordered = sorted(rows.values(), key=lambda row: (row.label, row.line))
    counts = Counter(row.label for row in ordered)
    if alone := [row for row in ordered if counts[row.label] < 2]:
        raise ValueError(f"{alone[0].where} must not name the only picture of its class (got {alone[0].label!r})")
    if len(counts) < 2:
        raise ValueError(f"{path} must name two classes or more (got {', '.join(map(repr, counts)) or 'none'})")
    return ordered


def _leaves(path: str) -> bool:
    """Whether a path leads out of the folder it is taken in, on any system."""
    windows = PureWindowsPath(path)  # knows both kinds of slashes
    return bool(windows.anchor or PurePosixPath(path).is_absolute() or ".." in windows.parts)


def _check_apart(rows: Mapping[str, Sequence[_Row]]) -> None:
    """ValueError where a class is in two parts."""
    firsts: dict[str, _Row] = {}
    for each in rows.values():
        own: dict[str, _Row] = {}
        for row in each:
            own.setdefault(row.label, row)
        for label, row in own.items():
            if label in firsts:
                raise ValueError(
                    f"{row.where} must name a class of no other part (got {label!r}, as {firsts[label].where})"
                )
        firsts |= own


def _located(root: Path, rows: Sequence[_Row]) -> list[Path]:
    """Where the pictures lie."""
    found = []
    missing = []
    for row in rows:
        folders = (root / "images", root / "images" / row.label, root / row.label)
        # os.path, for of a name that no system has, such as a too long one, it says that there is none.
        path = next((each / row.filename for each in folders if os.path.isfile(each / row.filename)), None)
        if path is None:
            missing.append(row)
        else:
            found.append(path)
    if missing:
        first = min(missing, key=lambda row: row.line)
        raise FileNotFoundError(
            f"{root} lacks {len(missing)} of {len(rows)} pictures, {first.filename!r} on {first.where} the first; they "
            "must lie in images/, images/<label>/ or <label>/"
        )
    return found


def _state(root: Path, rows: Sequence[_Row], files: Sequence[Path]) -> tuple[str, str]:
    """What tells one state of a part from another without reading its pictures."""
    digest = hashlib.sha256()
    for row, file in zip(rows, files, strict=True):
        status = file.stat()
        values = (row.label, row.line, file.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)
        digest.update(f"{values!r}\n".encode())
    return str(root.resolve()), digest.hexdigest()


def _read(kept: Rows, rows: Sequence[_Row], files: Sequence[Path], size: int, damaged: str) -> Arrays:
    """Decode pictures into `kept`, uint8 `[3, size, size]`, class after class.

    counts, names: of the classes. damaged: a sentence for each picture left out.
    """
    sources = {row.label: row.source for row in rows}
    counts = dict.fromkeys(sources, 0)
    left_out: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for row, file in zip(rows, files, strict=True):
            try:
                image = decoded(file.read_bytes(), 3)
            except DAMAGE as error:
                reason = f"{file}, on {row.where}, cannot be read ({str(error) or type(error).__name__})"
                if damaged == "refuse":
                    raise ValueError(f'{reason}; replace it, or give damaged="skip"') from error
                left_out.append(reason)
                continue
            kept.append(np.broadcast_to(array(resized(image, size)), (3, size, size)))
            counts[row.label] += 1
    for label, count in counts.items():
        if count < 2:
            raise ValueError(
                f"a class must have two pictures or more that can be read (got {count} of {label!r} in "
                f"{sources[label]}); replace those that cannot"
            )
    return {
        "counts": np.array([*counts.values()]),
        "names": np.array([*counts]),
        "damaged": np.array(left_out, dtype=str),
    }


def _warn(rows: Mapping[str, Sequence[_Row]], damaged: Sequence[str]) -> None:
    named = {part: len(each) for part, each in rows.items()}
    said = []
    if damaged:
        said.append(f"{len(damaged)} of {sum(named.values())} pictures are skipped; the first: {damaged[0]}")
    for part, total in named.items():
        if total != PUBLISHED[part]:
            said.append(f"{rows[part][0].source} names {total:,} of {PUBLISHED[part]:,} published pictures")
    for text in said:
        warnings.warn(text, stacklevel=3)
