"""CLINC150 (Larson et al. 2019, arXiv 1909.02027): 150 intents, 150 sentences each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cache import expanded
from ..download import fetch
from ..sentences import Said, Sentences

_FILE = "data_full.json"
URL = "https://raw.githubusercontent.com/clinc/oos-eval/master/data"
DIGESTS = {_FILE: "sha256:36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0"}


class Clinc150(Sentences):
    """What people ask of an assistant, as token ids, int64 `[N, length]`, padded with 0; a class is an intent.

    The intents are shuffled by `seed` and divided into 96, 24 and 30: the published parts are of sentences, and tasks
    need some of classes. What is called `oos...` (out of scope) is left out.

    Args:
        root: the folder with `data_full.json`, or such a file: `{"train": [[text, label], ...], ...}`.
        split: `"train"`, `"validation"`, `"test"` or `"all"`.
        tokenizer, length, vocabulary: as of `Text`.
        seed: of the shuffle.
        download: fetch the file into `root`, if it is not there.

    Attributes:
        vocabulary: ids are below it.

    Raises:
        FileNotFoundError, ValueError: the file is missing, or is none of these; the message says what to do.
        ConnectionError: the download failed.
        TypeError, ValueError: `tokenizer` gives something else, or an argument is out of range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        tokenizer: str | Callable[[list[str]], Any] = "words",
        length: int = 32,
        vocabulary: int = 32768,
        seed: int = 0,
        download: bool = False,
    ) -> None:
        folder = expanded(root)
        super().__init__(_read(folder, download), folder, split, tokenizer, length, vocabulary, seed)


def _read(root: Path, download: bool) -> Said:
    """What all parts of CLINC150 hold, without what is out of scope."""
    wanted = '{"train": [[text, label], ...], ...}, as CLINC150 is'
    path = root if root.is_file() else root / _FILE
    if download:
        fetch(f"{URL}/{_FILE}", path, DIGESTS[_FILE])
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; download=True fetches it")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); it must be {wanted}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be {wanted} (got a {type(content).__name__})")
    for part, pairs in content.items():
        if part.startswith("oos"):
            continue
        if not isinstance(pairs, list):
            raise ValueError(f"{path} must be {wanted} (got a {type(pairs).__name__} in {part!r})")
        for number, pair in enumerate(pairs):
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
                raise ValueError(f"{path} must be {wanted} (got {str(pair)[:60]} as {part}[{number}])")
            sentence, label = pair
            yield sentence, label.strip(), f"{part}[{number}] of {path}"
