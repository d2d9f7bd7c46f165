"""Sentences and what they are about: a csv file, or CLINC150's JSON (Larson et al. 2019, arXiv 1909.02027)."""

from __future__ import annotations

import csv
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checks import check_count, check_integer
from ..cache import expanded
from ..division import check_split, part_of
from ..samples import ClassSamples

CLINC150 = "data_full.json"
"""The file that is read where `root` is a folder."""

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


class Text(ClassSamples):
    """Sentences as token ids, int64 `[N, length]`, padded with 0; a class is a label, such as an intent.

    The classes are shuffled by `seed` and divided 64 : 16 : 20, whatever parts the file has: tests are on new classes.

    Args:
        root: a csv file in UTF-8 whose first line names the columns; or CLINC150's JSON, `{"train": [[text, label],
            ...], ...}`, or the folder with its `data_full.json`. Of JSON, what is called `oos...` (out of scope) is
            left out.
        split: `"train"`, `"validation"`, `"test"` or `"all"`.
        tokenizer: `"words"`: words in small letters, and punctuation; or a function from a list of sentences to a list
            of lists of ids, or to a mapping with these as `input_ids`.
        length: ids of a sentence; what is longer is cut, with a warning that counts.
        vocabulary: ids are below it. A word's id is its hash, `1 + crc32(word) % (vocabulary - 1)` (the hashing trick,
            Weinberger et al. 2009, arXiv 0902.2206): the same one in every file, part and process, whether or not it
            has been trained on. Some words share one: 1,137 of CLINC150's 6,429 do at the default.
        text, label: the columns of a csv file.
        seed: of the shuffle of classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of these, or has no such column, no sentences, an empty sentence or label.
        TypeError, ValueError: `tokenizer` gives something else, or an argument is out of range.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "said.csv"
    >>> _ = path.write_text("text,label\\nhi,greet\\nbye,part\\nHi there!,greet\\nbye bye,part\\n")
    >>> data = Text(path, "all", length=4)
    >>> data
    Text(2 classes, 2 to 2 samples each of shape (4,))
    """

    default_model = None  # networks that end in an embedding of ids are the user's

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        tokenizer: str | Callable[[list[str]], Any] = "words",
        length: int = 32,
        vocabulary: int = 32768,
        text: str = "text",
        label: str = "label",
        seed: int = 0,
    ) -> None:
        check_split(split)
        check_integer("length", length, low=1)
        check_count("vocabulary", vocabulary, low=2)
        check_integer("seed", seed)
        if not callable(tokenizer) and tokenizer != "words":
            raise ValueError(
                f'tokenizer must be "words" or a function from sentences to lists of ids (got {tokenizer!r})'
            )
        path = _find(expanded(root))
        sentences, labels = _of_json(path) if path.suffix.lower() == ".json" else _of_csv(path, text, label)
        rows = ClassSamples.from_arrays(torch.arange(len(labels)), labels)
        part = part_of(rows, split, seed)
        chosen = _sentences(sentences, part)
        if callable(tokenizer):
            ids = _checked(tokenizer(chosen), chosen, vocabulary)
        else:
            ids = [np.array([_id(word, vocabulary) for word in _words(each)]) for each in chosen]
        if longer := sum(len(each) > length for each in ids):
            warnings.warn(
                f"{path}: {longer} of {len(ids)} sentences have more than {length} tokens and are cut", stacklevel=2
            )
        samples = np.zeros((len(ids), length), dtype=np.int64)
        for row, each in zip(samples, ids, strict=True):
            row[: len(each)] = each[:length]
        sizes = part.counts.sum(1)
        super().__init__(torch.from_numpy(samples), np.cumsum(sizes) - sizes, part.counts, part.names)
        self.vocabulary = vocabulary


def _sentences(sentences: Sequence[str], part: ClassSamples) -> list[str]:
    """Those whose rows a part holds, class after class."""
    return [sentences[row] for index in range(len(part)) for row in part.class_samples(index).tolist()]


def _find(root: Path) -> Path:
    path = root / CLINC150 if root.is_dir() else root
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; root must be a csv file, or CLINC150's {CLINC150} or its folder")
    return path


def _of_csv(path: Path, text: str, label: str) -> tuple[list[str], list[str]]:
    """Sentences and labels of a csv file."""
    sentences, labels = [], []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if not header:
                raise ValueError(f"{path} must begin with a line that names its columns (got an empty one)")
            for name, column in (("text", text), ("label", label)):
                if header.count(column) != 1:
                    raise ValueError(
                        f"{name} must be one of the columns of {path}, {', '.join(header)} (got {column!r})"
                    )
            if text == label:
                raise ValueError(f"label must be another column than text (got {label!r})")
            for row in filter(None, reader):
                where = f"line {reader.line_num} of {path}"
                if len(row) != len(header):
                    raise ValueError(
                        f"{where} must have {len(header)} columns as the first (got {len(row)}); "
                        "put quotes around text with commas"
                    )
                sentence, name = row[header.index(text)], row[header.index(label)].strip()
                _check(sentence, name, where)
                sentences.append(sentence)
                labels.append(name)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} cannot be read after line {reader.line_num}: it must be csv in UTF-8 ({error})"
            ) from error
    if not sentences:
        raise ValueError(f"{path} must have sentences (got nothing below the names of its columns)")
    return sentences, labels


def _of_json(path: Path) -> tuple[list[str], list[str]]:
    """Sentences and labels of all parts of CLINC150, without those out of scope."""
    wanted = '{"train": [[text, label], ...], ...}, as CLINC150 is'
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); it must be {wanted}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be {wanted} (got a {type(content).__name__})")
    sentences, labels = [], []
    for part, pairs in content.items():
        if part.startswith("oos"):
            continue
        if not isinstance(pairs, list):
            raise ValueError(f"{path} must be {wanted} (got a {type(pairs).__name__} in {part!r})")
        for number, pair in enumerate(pairs):
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
                raise ValueError(f"{path} must be {wanted} (got {str(pair)[:60]} as {part}[{number}])")
            sentence, name = pair
            _check(sentence, name.strip(), f"{part}[{number}] of {path}")
            sentences.append(sentence)
            labels.append(name.strip())
    if not sentences:
        raise ValueError(f"{path} must have sentences (got none in {', '.join(content) or 'an empty mapping'})")
    return sentences, labels


def _check(sentence: str, label: str, where: str) -> None:
    if not _WORD.search(sentence):
        raise ValueError(f"{where} must have a sentence (got {sentence!r})")
    if not label or label.lower() == "nan":
        raise ValueError(f"{where} must have a label (got {label!r})")


def _words(sentence: str) -> list[str]:
    """Words in small letters, and punctuation.

    >>> _words("What's up, Jo?")
    ["what's", 'up', ',', 'jo', '?']
    """
    return _WORD.findall(sentence.lower())


def _id(word: str, vocabulary: int) -> int:
    """By hashing, 1 to `vocabulary - 1`: 0 is padding.

    >>> _id("hello", 32768)
    4777
    """
    return 1 + zlib.crc32(word.encode(errors="surrogatepass")) % (vocabulary - 1)


def _checked(given: Any, sentences: Sequence[str], vocabulary: int) -> list[np.ndarray]:
    """What a tokenizer gives, as ids of each sentence."""
    wanted = "tokenizer must give a list of ids for each sentence, or a mapping with these as input_ids"
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise ValueError(f"{wanted} (got a mapping with {', '.join(map(str, given)) or 'nothing'})")
        given = given["input_ids"]
    if isinstance(given, (str, bytes)) or not (hasattr(given, "__len__") and hasattr(given, "__iter__")):
        raise TypeError(f"{wanted} (got {type(given).__name__})")
    if len(given) != len(sentences):
        raise ValueError(f"{wanted} (got {len(given)} for {len(sentences)} sentences)")
    found = []
    for ids, sentence in zip(given, sentences, strict=True):
        try:
            array = np.asarray(ids)
        except (TypeError, ValueError):  # lists of several lengths, tensors elsewhere
            array = np.array(None)
        if array.ndim != 1 or not len(array):
            raise ValueError(f"{wanted} (got {str(ids)[:60]!r} for {sentence!r})")
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{wanted}, integers >= 0 (got {str(ids)[:60]} for {sentence!r})")
        if array.max() >= vocabulary:
            raise ValueError(
                f"tokenizer must give ids below vocabulary, {vocabulary} (got {array.max()} for {sentence!r}); "
                "vocabulary=... says how many it has"
            )
        found.append(array)
    return found
