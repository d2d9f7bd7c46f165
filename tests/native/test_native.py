"""The torch-free engine as plain C++ programs under sanitizers."""

import hashlib
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from metaaug_fast import _C

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENGINE = ROOT / "csrc" / "cpu"
# Optimised it takes three times as long to compile, and finds the same.
FLAGS = ["-std=c++17", "-O0", "-g1", "-Wall", "-Wno-psabi", f"-I{ROOT / 'csrc'}", "-fno-sanitize-recover=all"]


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def program(name: str, sources: list[Path], sanitizers: str, tmp_path: Path) -> Path:
    """Compile sources at once, one after each core; a program that nothing has changed for is built no more.

    Skips where there is no compiler, or none with these sanitizers.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]!r} was not found")
    command = [*compiler, *FLAGS, f"-fsanitize={sanitizers}"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    works = f"{shlex.join([*command, str(probe), '-o', str(tmp_path / 'probe')])} && {tmp_path / 'probe'}"
    if subprocess.run(works, shell=True, capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler[0]} has no working -fsanitize={sanitizers}")

    digest = hashlib.sha256(repr((command, run(*compiler, "--version"), list(map(str, sources)))).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), *HERE.glob("*.cpp")]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "native" / name
    target = folder / digest.hexdigest()[:16]
    if not target.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        objects = [tmp_path / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source, to: run(*command, "-c", source, "-o", to), sources, objects))
        run(*command, *objects, "-pthread", "-o", tmp_path / name)
        shutil.move(tmp_path / name, target)
    return target


def test_engine(tmp_path):
    """Every op, loss and option on random graphs; the program prints its seed."""
    widest = ENGINE / "isa" / "avx512.cpp" if _C.instruction_set() == "avx512" else HERE / "wide.cpp"
    sources = [widest, ENGINE / "isa" / "avx2.cpp", ENGINE / "isa" / "baseline.cpp", HERE / "test_engine.cpp"]
    target = program("test_engine", [*sources, ENGINE.parent / "flow.cpp", *ENGINE.glob("*.cpp")], "address,undefined", tmp_path)
    assert "12 graphs" in run(target, timeout=600)


def test_pool(tmp_path):
    target = program("test_pool", [ENGINE / "pool.cpp", HERE / "test_pool.cpp"], "thread", tmp_path)
    assert "done" in run(target, timeout=600)
