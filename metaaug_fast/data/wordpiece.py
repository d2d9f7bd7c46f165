"""BERT's tokens: words cut into the longest pieces of a vocabulary (Wu et al. 2016, arXiv 1609.08144)."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from ..installed import minilm_file

_DIGEST = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
_LONGEST = 100  # letters of a word that is looked at
_CHINESE = (
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def wordpiece(sentences: Sequence[str]) -> list[list[int]]:
    """Ids of BERT's uncased English vocabulary, `[CLS]` before and `[SEP]` behind each sentence's own; 0 is padding.

    The vocabulary, of 30,522 pieces, comes with the package that has the model `minilm`.

    Raises:
        FileNotFoundError: that is not installed.
    """
    ids = _vocabulary()
    return [[ids["[CLS]"], *(ids[piece] for piece in pieces(each, ids)), ids["[SEP]"]] for each in sentences]


def pieces(sentence: str, vocabulary: Mapping[str, int]) -> list[str]:
    """A sentence cut into pieces of a vocabulary; `##` is before those that go on, `[UNK]` stands for other words.

    >>> pieces("Ünbelievable, no?", {"un": 0, "##believ": 1, "##able": 2, ",": 3})
    ['un', '##believ', '##able', ',', '[UNK]', '[UNK]']
    """
    return [piece for word in _words(sentence) for piece in _cut(word, vocabulary)]


def _cut(word: str, vocabulary: Mapping[str, int]) -> list[str]:
    found: list[str] = []
    begin = 0
    while begin < len(word) <= _LONGEST:
        starts = "##" if begin else ""
        longest = next((end for end in range(len(word), begin, -1) if starts + word[begin:end] in vocabulary), None)
        if longest is None:
            return ["[UNK]"]
        found.append(starts + word[begin:longest])
        begin = longest
    return found or ["[UNK]"]


def _words(sentence: str) -> list[str]:
    return "".join(_letters(sentence)).split()


def _letters(sentence: str) -> Iterator[str]:
    """Small letters without accents; spaces around punctuation and Chinese."""
    for letter in unicodedata.normalize("NFD", sentence.lower()):
        kind = unicodedata.category(letter)
        if letter.isspace():
            yield " "
        elif kind == "Mn" or kind[0] == "C" or letter == "\ufffd":
            continue
        elif _is_punctuation(letter, kind) or any(low <= ord(letter) <= high for low, high in _CHINESE):
            yield f" {letter} "
        else:
            yield letter


def _is_punctuation(letter: str, kind: str) -> bool:
    return kind[0] == "P" or (letter.isascii() and not letter.isalnum())


@functools.cache
def _vocabulary() -> dict[str, int]:
    lines = minilm_file("vocab.txt", _DIGEST).read_text(encoding="utf-8").split("\n")
    return {piece: number for number, piece in enumerate(lines) if piece}
