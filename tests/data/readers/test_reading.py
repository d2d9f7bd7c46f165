"""What lies where data are read from, and is not what it should be: a sentence, or a warning that counts."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from metaaug_fast.data import Glyphs, Omniglot
from metaaug_fast.data.cache import cache_folder, cached_arrays
from metaaug_fast.data.readers import omniglot


def png(side=28, height=None):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(int(torch.randint(2**32, ()))).random((height or side, side)) < 0.5).convert(
        "1"
    ).save(file, "PNG")
    return file.getvalue()


def png_that_claims(width, height):
    """A PNG whose header promises a picture of this size, and that ends there."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def root(tmp_path):
    """Unpacked archives `one` and `two` with 6 and 3 characters of 4 drawings."""
    for archive, characters in (("one", 6), ("two", 3)):
        for character in range(characters):
            folder = tmp_path / archive / f"Alphabet_{archive}" / f"character{character:02}"
            folder.mkdir(parents=True)
            for drawing in range(1, 5):
                (folder / f"{character:04}_{drawing:02}.png").write_bytes(png())
    return tmp_path


def packed(root):
    """The same as zips, the folders moved away."""
    for archive in ("one", "two"):
        with zipfile.ZipFile(root / f"{archive}.zip", "w") as file:
            for path in sorted((root / archive).glob("*/*/*")):
                file.write(path, path.relative_to(root))
        (root / archive).rename(root / f"unpacked_{archive}")
    return root


def read(root, **given):
    return Omniglot(root, "all", archives=("one", "two"), **given)


@pytest.mark.parametrize("form", ["folders", "zips"])
def test_resource_forks_of_macos_are_no_drawings(root, form):
    for path in list(root.glob("*/*/*/*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07 AppleDouble")
    for folder in list(root.glob("*/*/*")):
        copy = folder.parents[1] / "__MACOSX" / folder.name
        copy.mkdir(parents=True, exist_ok=True)
        (copy / "._x.png").write_bytes(b"\x00\x05\x16\x07 AppleDouble")
    data = read(root if form == "folders" else packed(root))
    assert len(data) == 9
    assert (data.counts == 4).all()


@pytest.mark.parametrize("form", ["folders", "zips"])
@pytest.mark.parametrize("size", [(20_000, 20_000), (10_000, 10_000), (2**30, 1)])
def test_pictures_too_large_to_be_drawings(root, form, size):
    path = root / "one/Alphabet_one/character03/0003_02.png"
    path.write_bytes(png_that_claims(*size))
    name = path.relative_to(root / "one")
    root = root if form == "folders" else packed(root)
    message = rf"one.* cannot be read, at or after {name} \(Image size \({size[0] * size[1]} pixels\) exceeds limit"
    with pytest.raises(ValueError, match=message):
        read(root)


def test_encrypted_zip(root):
    packed(root)
    content = bytearray((root / "one.zip").read_bytes())
    # Bit 0 of a header's flags: of every local file header (at 6) and of every one in the directory (at 8).
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + flags] |= 1
            at = content.find(mark, at + 1)
    (root / "one.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"one\.zip cannot be read, .* is encrypted, password required.*good copy"):
        read(root)


def test_pictures_that_are_no_squares_are_counted(root):
    for drawing in (1, 2, 3):
        (root / f"two/Alphabet_two/character01/0001_{drawing:02}.png").write_bytes(png(30, height=200))
    with pytest.warns(UserWarning, match=r"3 of 36 drawings are no squares and are squeezed into 28 x 28.*30 x 200"):
        first = read(root)
    with pytest.warns(UserWarning, match="3 of 36 drawings are no squares"):
        assert (read(root).samples == first.samples).all()


def test_missing_characters_of_the_official_archives_are_counted(root):
    for archive in ("one", "two"):
        (root / archive).rename(root / {"one": "images_background", "two": "images_evaluation"}[archive])
    for drawing in range(5, 21):
        (root / f"images_background/Alphabet_one/character02/0002_{drawing:02}.png").write_bytes(png())
    for _ in range(2):  # decoded, then from the cache
        with pytest.warns(UserWarning, match="characters") as caught:
            Omniglot(root, "all")
        assert [str(each.message) for each in caught] == [
            f"{root}/images_background: 958 of 964 characters are missing, so splits are not the papers'",
            f"{root}/images_background: 5 of 6 characters have fewer than 20 drawings",
            f"{root}/images_evaluation: 656 of 659 characters are missing, so splits are not the papers'",
            f"{root}/images_evaluation: 3 of 3 characters have fewer than 20 drawings",
        ]


def test_archives_of_ones_own_may_be_uneven(root):
    (root / "one/Alphabet_one/character03/0003_02.png").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(root)


def test_whole_archives_warn_of_nothing(real_omniglot):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Omniglot(real_omniglot, "all")


@pytest.mark.parametrize("within", [[], ["readme.txt"], ["Alphabet/x.png"]])
def test_folder_of_nothing_beside_a_good_archive(root, within):
    packed(root)
    for name in within:
        (root / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "one" / name).write_text("")
    (root / "one").mkdir(exist_ok=True)
    assert len(read(root)) == 9
    (root / "one.zip").unlink()
    with pytest.raises(ValueError, match=r"one holds no <alphabet>/<character>/<drawing>\.png"):
        read(root)


def test_download_into_a_folder_of_nothing(root, monkeypatch):
    fetched = []
    monkeypatch.setattr(omniglot, "fetch", lambda url, path, digest: fetched.append(path.name))
    (root / "three").mkdir()
    omniglot.download_omniglot(root, md5={"one.zip": "", "three.zip": ""})
    assert fetched == ["three.zip"]


def test_root_of_nobody(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"~nosuchuser/images_background\.zip is missing"):
        Omniglot("~nosuchuser")


@pytest.mark.parametrize("lacking", ["a", "names"])
def test_cache_that_lacks_an_array_is_made_again(tmp_path, lacking):
    arrays = {"a": np.arange(5), "names": np.array(["x"])}
    calls = []

    def get():
        return cached_arrays("thing", [1], lambda: calls.append(1) or arrays, tmp_path, names=("a", "names"))

    get()
    (path,) = tmp_path.iterdir()
    np.savez(path, **{name: value for name, value in arrays.items() if name != lacking})
    with pytest.warns(UserWarning, match=rf"thing-.*\.npz is damaged and is made again \(it has no {lacking}\)"):
        assert get().keys() == arrays.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get()
    assert len(calls) == 2


def test_omniglots_cache_that_lacks_an_array(root, tmp_path):
    whole = read(root, cache_dir=tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    with np.load(path) as stored:
        content = dict(stored)
    del content["packed"]
    np.savez(path, **content)
    with pytest.warns(UserWarning, match="it has no packed"):
        assert (read(root, cache_dir=tmp_path / "cache").samples == whole.samples).all()


def nobody(code, **variables):
    """Run code as a user without an entry in the password file."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "METAAUG_CACHE")}
    environment.pop("XDG_CACHE_HOME", None)
    code = f"import pwd; pwd.getpwuid = lambda uid: {{}}[uid]\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment | variables,
        timeout=120,
    )


def test_no_home_is_a_warning_and_no_cache():
    code = """
import warnings
from metaaug_fast.data.cache import cached_arrays
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        print(cached_arrays("thing", [1], lambda: {"a": 7}, names=("a",)))
print(*(each.message for each in caught), sep="\\n")
"""
    done = nobody(code)
    assert done.stdout.splitlines()[:2] == ["{'a': 7}"] * 2, done.stderr
    reason = "there is no home folder to keep a cache in: set METAAUG_CACHE to a folder, or HOME"
    assert f"thing is made again at every start ({reason})" in done.stdout


@pytest.mark.parametrize(("variable", "below"), [("METAAUG_CACHE", ""), ("XDG_CACHE_HOME", "metaaug_fast")])
def test_a_home_of_nobody_does_not_matter_where_the_cache_is_named(tmp_path, variable, below):
    code = "from metaaug_fast.data.cache import cache_folder; print(cache_folder())"
    done = nobody(code, **{variable: str(tmp_path)})
    assert done.stdout == f"{tmp_path / below}\n", done.stderr
    assert cache_folder("~nosuchuser/x").parts[0] == "~nosuchuser"


def test_glyphs_cache_that_lacks_an_array(tmp_path, monkeypatch):
    drawn = {"counts": np.full((20, 5), 2), "letters": np.array([*"abcdefghijklmnopqrst"])}
    drawn["images"] = np.zeros((200, 28, 28), np.uint8)
    monkeypatch.setattr("metaaug_fast.data.readers.glyphs._draw_all", lambda *_: drawn)
    Glyphs(cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    np.savez(path, images=drawn["images"], letters=drawn["letters"])
    with pytest.warns(UserWarning, match="it has no counts"):
        assert Glyphs(split="all", cache_dir=tmp_path).samples.shape == (200, 1, 28, 28)
