"""Sentences of one's own, and what they are about, in a csv file."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cache import expanded
from ..sentences import Said, Sentences


class Text(Sentences):
    """Sentences as token ids, int64 `[N, length]`, padded with 0; a class is a label, such as an intent.

    The classes are shuffled by `seed` and divided 64 : 16 : 20: tests are on new classes.

    Args:
        root: a csv file in UTF-8 whose first line names the columns.
        split: `"train"`, `"validation"`, `"test"` or `"all"`.
        tokenizer: `"words"`: words in small letters, and punctuation; `"wordpiece"`: BERT's, see `data.wordpiece`; or a
            function from a list of sentences to a list of lists of ids, or to a mapping with these as `input_ids`.
        length: ids of a sentence; what is longer is cut, with a warning that counts.
        vocabulary: ids are below it. A word's id is its hash, `1 + crc32(word) % (vocabulary - 1)` (the hashing trick,
            Weinberger et al. 2009, arXiv 0902.2206): the same one in every file, part and process, whether or not it
            has been trained on. Some words share one: 1,137 of CLINC150's 6,429 do at the default.
        text, label: the columns.
        seed: of the shuffle of classes.

    Attributes:
        vocabulary: ids are below it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none, or has no such column, no sentences, an empty sentence or label.
        TypeError, ValueError: `tokenizer` gives something else, or an argument is out of range.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "said.csv"
    >>> _ = path.write_text("text,label\\nhi,greet\\nbye,part\\nHi there!,greet\\nbye bye,part\\n")
    >>> data = Text(path, "all", length=4)
    >>> data
    Text(2 classes, 2 to 2 samples each of shape (4,))
    """

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
        path = expanded(root)
        super().__init__(_read(path, text, label), path, split, tokenizer, length, vocabulary, seed)


def _read(path: Path, text: str, label: str) -> Said:
    if not path.is_file():
        raise FileNotFoundError(f"root must be a csv file (there is none at {path})")
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
                yield row[header.index(text)], row[header.index(label)].strip(), where
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} cannot be read after line {reader.line_num}: it must be csv in UTF-8 ({error})"
            ) from error
