"""The Makefile: what it says where something is missing, and that it does nothing twice."""

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


@pytest.fixture
def tree(tmp_path):
    """A copy of what the Makefile looks at, and a python that writes down its arguments."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "csrc").mkdir()
    for name in ("setup.py", "pyproject.toml", "csrc/engine.cpp"):
        (tmp_path / name).touch()
    script(tmp_path / "python", 'echo "$*" >> calls')
    return tmp_path


def script(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def make(tree, *arguments, **environment):
    return subprocess.run(
        ["make", "--no-print-directory", f"PYTHON={tree / 'python'}", *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        env={**os.environ, "MAKEFLAGS": "", **environment},
        check=False,
    )


def with_venv(tree):
    """As if `python -m venv` had run."""
    (tree / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(tree / "python", tree / ".venv" / "bin" / "python")


def calls(tree):
    """The command lines since the last look."""
    path = tree / "calls"
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def test_old_python_is_one_sentence(tree):
    script(tree / "python", "exit 1")
    result = make(tree, "install")
    assert result.returncode != 0
    assert result.stdout == "metaaug_fast needs Python 3.10 or newer: make PYTHON=/path/to/python3\n"


def test_missing_venv_module_is_one_sentence(tree):
    script(tree / "python", 'case "$*" in *ensurepip*) exit 1;; esac')
    result = make(tree, "install")
    assert result.returncode != 0
    assert result.stdout.count("\n") == 1
    assert "has no venv module" in result.stdout
    assert not (tree / ".venv").exists()


def test_missing_compiler_is_one_sentence(tree):
    with_venv(tree)
    make(tree, "venv")
    result = make(tree, "install", CXX="no-such-compiler -O2")
    assert result.returncode != 0
    assert result.stdout == (
        "metaaug_fast needs a C++17 compiler and found no 'no-such-compiler': install g++ or clang++, or set CXX\n"
    )


def test_builds_again_only_where_sources_changed(tree):
    with_venv(tree)
    assert make(tree, "install", CXX="sh").returncode == 0
    first = calls(tree)
    assert any("torch==" in call for call in first)
    assert any("--no-build-isolation --editable .[test]" in call for call in first)
    assert make(tree, "install", CXX="sh").returncode == 0
    assert calls(tree) == []
    (tree / "metaaug_fast").mkdir()
    (tree / "metaaug_fast" / "new.py").touch()
    make(tree, "install", CXX="sh")
    assert calls(tree) == []
    for source in ("csrc/engine.cpp", "pyproject.toml"):
        os.utime(tree / source, (time.time() + 5, time.time() + 5))
        make(tree, "install", CXX="sh")
        again = calls(tree)
        assert len(again) == 1
        assert "--editable" in again[0]
        os.utime(tree / source, (time.time() - 5, time.time() - 5))


def test_continuous_integration_runs_what_a_developer_runs():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    assert path.read_text().splitlines()[-1] == "exec make test"


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("2", "METAAUG_CUDA must be 0 or 1 (got '2')"),
        ("1", "METAAUG_CUDA=1 needs a CUDA build of torch (got torch "),
        ("0", "metaaug_fast"),
    ],
)
def test_cuda_is_built_where_it_is_asked_for_and_can_be(asked, answer):
    if asked == "1" and torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    result = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "METAAUG_CUDA": asked},
        check=False,
    )
    assert (result.returncode == 0) == (asked == "0")
    assert answer in result.stdout + result.stderr
