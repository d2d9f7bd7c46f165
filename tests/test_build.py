"""The Makefile: what it says where something is missing, and that it does nothing twice."""

import os
import runpy
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from metaaug_fast import _C

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
    # What a make around the tests was given is in the environment of all that it runs.
    own = {name: value for name, value in os.environ.items() if name not in ("VENV", "PYTHON", "TORCH")}
    return subprocess.run(
        ["make", "--no-print-directory", f"PYTHON={tree / 'python'}", *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        env={**own, "MAKEFLAGS": "", "MAKEOVERRIDES": "", **environment},
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


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """What setup.py defines, beside a torch built with CUDA 12.4 and an nvcc that says another version of itself."""

    def load(nvcc):
        (tmp_path / "bin").mkdir()
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / "cuda_runtime.h").touch()
        script(tmp_path / "bin" / "nvcc", f"echo '{nvcc}'")
        monkeypatch.setattr(torch.version, "cuda", "12.4")
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
        monkeypatch.delenv("METAAUG_CUDA", raising=False)
        return runpy.run_path(str(ROOT / "setup.py"))

    return load


def test_an_nvcc_of_another_cuda_than_torchs_gives_the_cpu_engine_and_says_why(setup, tmp_path, monkeypatch, capsys):
    extension = setup("Cuda compilation tools, release 13.0, V13.0.48")["extension"]
    built = extension()
    missing = (
        f"nvcc of CUDA 12, which torch {torch.__version__} was built with (got release 13.0 in {tmp_path}): "
        "set CUDA_HOME to such a one, or install a torch built with CUDA 13"
    )
    assert not [source for source in built.sources if source.endswith(".cu")]
    assert built.define_macros == [("METAAUG_WHY_NO_CUDA", f'"{missing}"')]
    assert capsys.readouterr().out == f"metaaug_fast is built without its CUDA engine, which needs {missing}\n"
    monkeypatch.setenv("METAAUG_CUDA", "1")
    with pytest.raises(SystemExit, match=r"^METAAUG_CUDA=1 needs nvcc of CUDA 12, which") as refused:
        extension()
    assert str(refused.value) == f"METAAUG_CUDA=1 needs {missing}"
    monkeypatch.setenv("METAAUG_CUDA", "0")
    assert extension().define_macros == [("METAAUG_WHY_NO_CUDA", '"METAAUG_CUDA to be 1 or unset (got 0)"')]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("nvcc", ["Cuda compilation tools, release 12.9, V12.9.86", "a compiler without a version"])
def test_an_nvcc_of_torchs_cuda_gives_the_gpu_engine(nvcc, setup, capsys):
    built = setup(nvcc)["extension"]()
    assert [source for source in built.sources if source.endswith(".cu")]
    assert ("METAAUG_CUDA", "1") in built.define_macros
    assert capsys.readouterr().out == ""


def test_the_extension_knows_why_it_has_no_gpu_engine():
    assert bool(_C.why_no_cuda) == (not _C.cuda)


def test_the_oldest_torch_has_an_environment_of_its_own(tree):
    with_venv(tree)
    (tree / ".venv-oldest" / "bin").mkdir(parents=True)
    script(tree / ".venv-oldest" / "bin" / "python", 'echo "oldest $METAAUG_CUDA $*" >> calls')
    assert make(tree, "test-oldest", CXX="sh").returncode == 0
    first, *_, last = calls(tree)
    assert first.startswith("oldest 0 -m pip install")
    assert "torch==2.6.0 " in first
    assert last == "oldest 0 -m pytest -q -n auto --dist worksteal -m not slow"
