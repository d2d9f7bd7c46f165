import os
import pwd
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from metaaug_fast.data import cache
from metaaug_fast.data.cache import cache_folder, cached_arrays


@pytest.fixture
def made(rng, tmp_path):
    """Arrays, a call that caches them in `tmp_path`, and a list of how often they were made."""
    arrays = {"a": rng.integers(0, 255, (50, 7), dtype=np.uint8), "names": np.array(["x", "λ"])}
    calls = []

    def get(key=1, cache_dir=tmp_path):
        return cached_arrays("thing", [key, "x"], lambda: calls.append(key) or arrays, cache_dir)

    return arrays, get, calls


def same(left, right):
    return left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)


def test_second_time_comes_from_disk(made, tmp_path):
    arrays, get, calls = made
    assert same(get(), arrays)
    assert same(get(), arrays)
    assert calls == [1]
    get(2)
    assert calls == [1, 2]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "garbage"])
def test_damaged_file_is_made_again_with_a_warning(made, tmp_path, rng, damage):
    arrays, get, calls = made
    get()
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        # Within the compressed data of the first array.
        content[int(rng.integers(60, 300))] ^= 0xFF
    path.write_bytes(
        {"empty": b"", "truncated": content[: len(content) // 2], "garbage": b"?" * 99}.get(damage, content)
    )
    with pytest.warns(UserWarning, match=r"thing-.*\.npz is damaged and is made again"):
        assert same(get(), arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(get(), arrays)
    assert calls == [1, 1]


def test_unwritable_cache_is_a_warning(made, tmp_path):
    arrays, get, _ = made
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(
        UserWarning, match=r"below/thing-.* cannot be written \(Not a directory\); the next start is as slow"
    ):
        assert same(get(cache_dir=tmp_path / "file" / "below"), arrays)


def test_interrupted_write_leaves_nothing(made, tmp_path, monkeypatch):
    _, get, _ = made

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_leaves_is_removed(made, tmp_path):
    """Killed when the file was written but had not its name yet."""
    arrays, get, _ = made
    script = "import os, numpy, sys; from metaaug_fast.data.cache import cached_arrays\n"
    script += "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
    script += "cached_arrays('other', [], lambda: {'a': numpy.ones(3)}, sys.argv[1])"
    assert subprocess.run([sys.executable, "-c", script, tmp_path], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    assert same(get(), arrays)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other places")
def test_folder(monkeypatch, tmp_path):
    assert cache_folder(tmp_path) == tmp_path
    assert cache_folder() == Path(os.environ["METAAUG_CACHE"])
    monkeypatch.delenv("METAAUG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "metaaug_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "metaaug_fast"


def test_no_home_is_the_same_error_with_an_older_platformdirs(monkeypatch):
    """Which gives a path that begins with `~`, where a newer one raises."""
    for name in ("METAAUG_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda user: {}[user])
    for answer in (cache.user_cache_dir, "~/.cache/{}".format):
        monkeypatch.setattr(cache, "user_cache_dir", answer)
        with pytest.raises(OSError, match="there is no home folder to keep a cache in: set METAAUG_CACHE"):
            cache_folder()
