import unicodedata

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from metaaug_fast.data import Episodes, Glyphs
from metaaug_fast.data.readers import glyphs


@pytest.fixture(scope="module")
def everything(cache):
    return Glyphs(split="all")


@pytest.fixture
def two_fonts(monkeypatch):
    """Two typefaces instead of 21, so that rendering is quick."""
    monkeypatch.setattr(glyphs, "FAMILIES", {"DejaVu Sans": ("DejaVuSans",), "Computer Modern": ("cmr10",)})


def by_letter(data):
    return {name[0]: index for index, name in enumerate(data.names)}


def test_every_matplotlib_has_the_typefaces():
    """Those that 3.10 came with, the last for Python 3.10: later ones add to them."""
    early = {f"DejaVu{kind}{bold}" for kind in ("Sans", "SansMono", "Serif") for bold in ("", "-Bold")}
    early |= {f"DejaVu{kind}-{bold}Oblique" for kind in ("Sans", "SansMono") for bold in ("", "Bold")}
    early |= {f"DejaVuSerif-{bold}Italic" for bold in ("", "Bold")}
    early |= {f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")}
    early |= {"cmb10", "cmex10", "cmmi10", "cmr10", "cmss10", "cmsy10", "cmtt10"}
    assert {font for family in glyphs.FAMILIES.values() for font in family} <= early


def test_about_as_many_letters_as_omniglot(everything):
    assert 1200 < len(everything) < 1500
    assert everything.sample_shape == (1, 28, 28)
    assert everything.counts.sum(1).min() >= 12
    assert everything.counts.sum(1).max() <= 21
    assert everything.styles == tuple(glyphs.FAMILIES)
    assert all(unicodedata.category(name[0]).startswith("L") for name in everything.names)
    scripts = {name.split()[1] for name in everything.names}
    assert {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN"} <= scripts


def test_pictures_are_centred_within_the_margin(everything):
    ink = everything.samples[:, 0].numpy() > 0
    assert ink.any((1, 2)).all()
    for axis in (1, 2):
        along = ink.any(axis)
        first, last = along.argmax(1), 27 - along[:, ::-1].argmax(1)
        assert first.min() >= 1
        assert last.max() <= 26
        assert abs(first + last - 27).max() <= 1
    assert everything.samples.max() == 255


def test_size_is_the_typeface_s(everything):
    height = {}
    for letter in "xX":
        image = everything.class_samples(by_letter(everything)[letter])[0, 0].numpy()
        height[letter] = (image.max(1) > 127).sum()
    assert height["x"] < height["X"] < 20


@pytest.mark.parametrize(
    "pair", ["C\u0421", "A\u0391", "o\u03bf", "p\u0440", "\u00b5\u03bc", "\u03a9\u2126", "\u02b0\u2095", "O\u041e"]
)
def test_look_alikes_are_one_class(everything, pair):
    letters = by_letter(everything)
    assert pair[0] in letters
    assert pair[1] not in letters


@pytest.mark.parametrize("pair", ["cC", "oO", "eé", "éè", "uü", "Il", "nh", "бд", "πп", "\u03b9l", "ÖŐ"])
def test_different_letters_stay_apart(everything, pair):
    assert set(pair) <= set(by_letter(everything))


def test_no_two_classes_share_their_pictures(everything):
    seen: dict[bytes, int] = {}
    shared: dict[tuple[int, int], int] = {}
    for index in range(len(everything)):
        for image in {image.numpy().tobytes() for image in everything.class_samples(index)}:
            if image in seen:
                shared[seen[image], index] = shared.get((seen[image], index), 0) + 1
            seen.setdefault(image, index)
    sizes = everything.counts.sum(1)
    assert all(count <= min(sizes[a], sizes[b]) / 2 for (a, b), count in shared.items())


def test_no_missing_glyph_boxes(everything):
    folder = f"{matplotlib.get_data_path()}/fonts/ttf"
    pictures = {image.tobytes() for image in everything.samples[:, 0].numpy()}
    for name in (name for names in glyphs.FAMILIES.values() for name in names):
        font = ImageFont.truetype(f"{folder}/{name}.ttf", 24 * 4, layout_engine=ImageFont.Layout.BASIC)
        box = glyphs._draw(font, "\U0010fffe", 28)
        assert box.tobytes() not in pictures


def test_pictures_are_the_letters(everything):
    """Each picture correlates with its letter drawn directly, small, by Pillow in the same typeface."""
    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    font = ImageFont.truetype(path, 24, layout_engine=ImageFont.Layout.BASIC)
    letters = by_letter(everything)
    for letter in "gRЖψზ":
        canvas = Image.new("L", (28, 28))
        ImageDraw.Draw(canvas).text((14, 14), letter, fill=255, font=font, anchor="mm")
        left, top, right, bottom = canvas.getbbox()
        centred = Image.new("L", (28, 28))
        centred.paste(canvas.crop((left, top, right, bottom)), ((28 - right + left) // 2, (28 - bottom + top) // 2))
        direct = np.asarray(centred, dtype=float)
        ours = everything.class_samples(letters[letter])[0, 0].numpy().astype(float)
        shifts = [np.roll(direct, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        assert max(np.corrcoef(ours.ravel(), shifted.ravel())[0, 1] for shifted in shifts) > 0.8


def test_splits(everything):
    parts = [Glyphs(split=split) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(everything)
    assert len({name for part in parts for name in part.names}) == len(everything)
    assert 0.7 < len(parts[0]) / len(everything) < 0.8
    assert Glyphs(split="test", seed=1).names != parts[2].names


def test_episodes_with_divided_styles(everything):
    for shots, queries in ((1, 5), (1, 1), (4, 8)):
        batch = next(Episodes(everything, 5, shots, queries, tasks=4, split_styles=True))
        assert batch.query_x.shape == (4, 5 * queries, 1, 28, 28)
        support = batch.support_x.view(4, 5, shots, 1, -1)
        query = batch.query_x.view(4, 5, 1, queries, -1)
        assert (support != query).any(-1).all()
    with pytest.raises(ValueError, match="split_styles needs styles that can be divided into 5 support and 5 query"):
        Episodes(everything, 5, 5, 5, split_styles=True)


def test_rendering_is_deterministic(everything, tmp_path, monkeypatch, two_fonts):
    first = Glyphs(styles_min=2, split="all", cache_dir=tmp_path / "a")
    second = Glyphs(styles_min=2, split="all", cache_dir=tmp_path / "b")
    assert first.names == second.names
    assert torch.equal(first.samples, second.samples)
    # TeX's encoding is left alone beyond ASCII.
    assert "".join(name[0] for name in first.names) == "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def test_other_sizes_and_cache(two_fonts, tmp_path, monkeypatch):
    small = Glyphs(size=14, styles_min=2, cache_dir=tmp_path)
    large = Glyphs(size=64, styles_min=2, cache_dir=tmp_path)
    assert small.sample_shape == (1, 14, 14)
    assert large.sample_shape == (1, 64, 64)
    monkeypatch.setattr(glyphs, "_draw", lambda *_: pytest.fail("drawn again"))
    assert torch.equal(Glyphs(size=14, styles_min=2, cache_dir=tmp_path).samples, small.samples)


def test_bad_arguments(two_fonts, monkeypatch):
    with pytest.raises(ValueError, match=r"split must be one of train, validation, test, all \(got 'dev'\)"):
        Glyphs(split="dev")
    with pytest.raises(ValueError, match=r"size must be >= 8 \(got 4\)"):
        Glyphs(size=4)
    with pytest.raises(ValueError, match=r"styles_min must be between 1 and the 2 typefaces there are \(got 3\)"):
        Glyphs(styles_min=3)
    monkeypatch.setattr(glyphs, "FAMILIES", {"None": ("NoSuchFont",)})
    with pytest.raises(FileNotFoundError, match=r"NoSuchFont\.ttf is missing; reinstall matplotlib"):
        Glyphs()
