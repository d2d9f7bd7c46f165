"""Glyphs: the letters of matplotlib's own fonts, few-shot data that needs no download."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features

from ..cache import Arrays, cached_arrays, file_digest
from ..division import check_split
from ..samples import ClassSamples

# The families that `split_styles` divides. The other fonts of matplotlib hold symbols, or a box for every code point;
# cmti10 comes with its later releases only.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "DejaVu Sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    "DejaVu Sans Mono": (
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSansMono-Oblique",
        "DejaVuSansMono-BoldOblique",
    ),
    "DejaVu Serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    "STIX General": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "Computer Modern": ("cmr10", "cmb10", "cmmi10", "cmss10", "cmtt10"),
}
# TeX's encoding: beyond ASCII these fonts give other shapes than the code points promise.
_ASCII_ONLY = "Computer Modern"
SPLIT = {"train": 75, "validation": 5, "test": 20}
# Two letters whose pictures differ by less than this share of their ink, in most of the styles they share, are one
# class. The same shape under two code points measures 0 to 0.01 (Latin and Cyrillic C), the smallest visible accents
# (a Greek breathing to the left or the right) about 0.015, an umlaut and a breve 0.03: 1,530 letters, 1,300 classes.
LOOK_ALIKE = 0.02
_OVERSAMPLE = 4


class Glyphs(ClassSamples):
    """Letters in up to 21 typefaces of five families, one picture a typeface; ink is 1, paper is 0.

    A class is a letter (Unicode category L: Latin, Greek, Cyrillic, Armenian, Georgian, phonetic signs, ...) that at
    least `styles_min` of the typefaces can write; letters that look alike are one class. All pictures have the
    typeface's natural proportions, 24 pixels to the em at `size=28`, are centred, and are reduced where they would
    leave the margin of one pixel. Rendering takes a few seconds, once: see `cache.cache_folder`.

    Args:
        size: side of the pictures.
        styles_min: typefaces that must have the letter.
        split: `"train"` (75 % of the letters), `"validation"` (5 %), `"test"` (20 %) or `"all"`.
        seed: of the shuffle of letters before the split.
        cache_dir: where rendered pictures are kept.

    Raises:
        FileNotFoundError: matplotlib lies there without its fonts.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        size: int = 28,
        styles_min: int = 12,
        split: str = "train",
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        check_split(split)
        if size < 8:
            raise ValueError(f"size must be >= 8 (got {size})")
        fonts = _font_files()
        typefaces = sum(map(len, fonts.values()))
        if not 1 <= styles_min <= typefaces:
            raise ValueError(f"styles_min must be between 1 and the {typefaces} typefaces there are (got {styles_min})")
        sources = [Path(__file__), *(path for paths in fonts.values() for path in paths)]
        made_from = [size, styles_min, features.version("freetype2"), *map(file_digest, sources)]
        names = ("images", "counts", "letters")
        stored = cached_arrays("glyphs", made_from, lambda: _draw_all(fonts, size, styles_min), cache_dir, names=names)
        sizes = stored["counts"].sum(1)
        data = ClassSamples(
            torch.from_numpy(stored["images"]),
            np.cumsum(sizes) - sizes,
            stored["counts"],
            [_name(letters) for letters in stored["letters"].tolist()],
            tuple(fonts),
        )
        if split != "all":
            data = data.split_shares(SPLIT, seed)[split]
        super().__init__(data.samples, data.first, data.counts, data.names, data.styles)


def _name(letters: str) -> str:
    """The letter and its Unicode name; a class of look-alikes goes by the first of them."""
    return f"{letters[0]} {unicodedata.name(letters[0], 'unnamed')}"


def _font_files() -> dict[str, list[Path]]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = {family: [folder / f"{name}.ttf" for name in names] for family, names in FAMILIES.items()}
    missing = [path for paths in fonts.values() for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is missing; reinstall matplotlib with its fonts")
    return fonts


def _draw_all(fonts: Mapping[str, list[Path]], size: int, styles_min: int) -> Arrays:
    """All letters: images `[N, size, size]`, counts `[classes, families]`, letters of each class."""
    paths = [path for group in fonts.values() for path in group]
    family_of = np.repeat(np.arange(len(fonts)), [len(group) for group in fonts.values()])
    covered = [_letters(path, ascii_only=family == _ASCII_ONLY) for family, group in fonts.items() for path in group]
    known, occurrences = np.unique([letter for letters in covered for letter in letters], return_counts=True)
    chosen = known[occurrences >= styles_min].tolist()
    images = np.zeros((len(chosen), len(paths), size, size), dtype=np.uint8)
    for style, (path, letters) in enumerate(zip(paths, covered, strict=True)):
        font = ImageFont.truetype(str(path), round(size * 6 / 7) * _OVERSAMPLE, layout_engine=ImageFont.Layout.BASIC)
        for row, letter in enumerate(chosen):
            if letter in letters:
                images[row, style] = _draw(font, letter, size)
    drawn = images.max((2, 3)) > 0
    groups = [group for group in _look_alikes(images, drawn) if drawn[group].any(0).sum() >= styles_min]
    # In each style a class has the picture of its first letter that has one: a double could be both support and query.
    merged = [(drawn[group].any(0), np.asarray(group)[drawn[group].argmax(0)]) for group in groups]
    return {
        "images": np.concatenate([images[letter[has], np.flatnonzero(has)] for has, letter in merged]),
        "counts": np.array([np.bincount(family_of[has], minlength=len(fonts)) for has, _ in merged]),
        "letters": np.array(["".join(chosen[row] for row in group) for group in groups]),
    }


def _letters(path: Path, ascii_only: bool) -> set[str]:
    """The letters a font has a glyph of its own for."""
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

    with TTFont(path, lazy=True) as font:
        glyphs = font.getBestCmap()
    return {
        chr(code)
        for code, glyph in glyphs.items()
        if glyph != ".notdef" and unicodedata.category(chr(code)).startswith("L") and (code < 128 or not ascii_only)
    }


def _draw(font: ImageFont.FreeTypeFont, letter: str, size: int) -> np.ndarray:
    """A letter, centred, uint8 `[size, size]`; all 0 if the font's glyph is blank."""
    left, top, right, bottom = font.getbbox(letter)
    large = Image.new("L", (max(int(right - left), 1), max(int(bottom - top), 1)))
    ImageDraw.Draw(large).text((-left, -top), letter, font=font, fill=255)
    ink = large.crop(large.getbbox())
    # A margin of one pixel, and one more in all because the middle may lie between two pixels.
    scale = min(1 / _OVERSAMPLE, (size - 3) / max(ink.size))
    side = round(size / scale)
    canvas = Image.new("L", (side, side))
    canvas.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def _look_alikes(images: np.ndarray, drawn: np.ndarray) -> list[list[int]]:
    """Rows of `images` `[letters, styles, size, size]` in groups that look alike, in order of their first rows.

    Pictures a, b look alike if `|a - b|^2 < LOOK_ALIKE (|a|^2 + |b|^2)`; letters, if more than half of the styles
    that have both say so. Groups are the connected components.
    """
    letters, styles = drawn.shape
    alike = np.zeros((letters, letters), dtype=np.int64)
    shared = np.zeros_like(alike)
    for style in range(styles):
        flat = images[:, style].reshape(letters, -1) / 255
        inner = flat @ flat.T
        energy = np.diag(inner)[:, None] + np.diag(inner)
        both = drawn[:, style, None] & drawn[:, style]
        shared += both
        alike += both & (energy - 2 * inner < LOOK_ALIKE * energy)
    linked = 2 * alike > shared
    group_of = np.arange(letters)
    while True:
        # Every letter takes the smallest group among those it is linked to, until none changes.
        smallest = np.where(linked, group_of, letters).min(1)
        smallest = np.minimum(smallest, group_of)
        if (smallest == group_of).all():
            return [np.flatnonzero(group_of == group).tolist() for group in np.unique(group_of)]
        group_of = smallest
