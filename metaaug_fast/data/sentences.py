"""Sentences as token ids: what all readers of text share."""

from __future__ import annotations

import copy
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..checks import check_count, check_integer
from .division import check_split, part_of
from .samples import ClassSamples
from .wordpiece import wordpiece

Said = Iterable[tuple[str, str, str]]
"""A sentence, its label, and where they stand, for messages."""

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


class Sentences(ClassSamples):
    """Sentences as token ids, int64 `[N, length]`, padded with 0; a class is a label.

    The classes are shuffled by `seed` and divided 64 : 16 : 20.

    Args:
        said: all sentences; they are read once the other arguments have been checked.
        source: where they come from, in a warning.

    See `Text` for the others.

    Attributes:
        vocabulary: ids are below it.

    Raises:
        ValueError: there are no sentences, or a sentence or a label is empty.
        TypeError, ValueError: `tokenizer` gives something else, or an argument is out of range.
    """

    default_model = "deep_averaging"

    def __init__(
        self,
        said: Said,
        source: object,
        split: str,
        tokenizer: str | Callable[[list[str]], Any],
        length: int,
        vocabulary: int,
        seed: int,
    ) -> None:
        check_split(split)
        check_integer("length", length, low=1)
        check_count("vocabulary", vocabulary, low=2)
        check_integer("seed", seed)
        if tokenizer == "wordpiece":
            tokenizer = wordpiece
        if not callable(tokenizer) and tokenizer != "words":
            raise ValueError(
                'tokenizer must be "words", "wordpiece" or a function from sentences to lists of ids '
                f"(got {tokenizer!r})"
            )
        sentences, labels = _read(said, source)
        rows = ClassSamples.from_arrays(torch.arange(len(labels)), labels)
        part = part_of(rows, split, seed)
        chosen = [sentences[row] for index in range(len(part)) for row in part.class_samples(index).tolist()]
        if callable(tokenizer):
            ids = _checked(tokenizer(chosen), chosen, vocabulary)
        else:
            ids = [np.array([word_id(word, vocabulary) for word in words(each)]) for each in chosen]
        if longer := sum(len(each) > length for each in ids):
            warnings.warn(
                f"{source}: {longer} of {len(ids)} sentences have more than {length} tokens and are cut", stacklevel=3
            )
        samples = np.zeros((len(ids), length), dtype=np.int64)
        for row, each in zip(samples, ids, strict=True):
            row[: len(each)] = each[:length]
        sizes = part.counts.sum(1)
        super().__init__(torch.from_numpy(samples), np.cumsum(sizes) - sizes, part.counts, part.names)
        self.vocabulary = vocabulary

    def to(self, device: torch.device | str) -> Sentences:
        """The same on a device; see `ClassSamples.to`."""
        moved = copy.copy(self)
        moved.samples = self.samples.to(device)
        return moved


def _read(said: Said, source: object) -> tuple[list[str], list[str]]:
    """Sentences and labels, none of them empty."""
    sentences, labels = [], []
    for sentence, label, where in said:
        if not _WORD.search(sentence):
            raise ValueError(f"{where} must have a sentence (got {sentence!r})")
        if not label or label.lower() == "nan":
            raise ValueError(f"{where} must have a label (got {label!r})")
        sentences.append(sentence)
        labels.append(label)
    if not sentences:
        raise ValueError(f"{source} must have sentences (got none)")
    return sentences, labels


def words(sentence: str) -> list[str]:
    """Words in small letters, and punctuation.

    >>> words("What's up, Jo?")
    ["what's", 'up', ',', 'jo', '?']
    """
    return _WORD.findall(sentence.lower())


def word_id(word: str, vocabulary: int) -> int:
    """By hashing, 1 to `vocabulary - 1`: 0 is padding.

    >>> word_id("hello", 32768)
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
