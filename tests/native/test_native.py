"""The torch-free engine as plain C++ programs under sanitizers."""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from metaaug_fast import _C
from tests.builds import folder_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENGINE = ROOT / "csrc" / "cpu"
pytestmark = pytest.mark.slow
SHARED = [ROOT / "csrc" / name for name in ("call.cpp", "flow.cpp", "fuse.cpp")]
# Optimised it takes three times as long to compile, and finds the same.
FLAGS = [
    "-std=c++17",
    "-O0",
    "-g1",
    "-Wall",
    "-Wno-psabi",
    f"-I{ROOT / 'csrc'}",
    f"-I{HERE}",
    "-fno-sanitize-recover=all",
]


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def seed() -> str:
    return str(int(torch.randint(2**32, ())))


def program(name: str, sources: list[Path], sanitizers: str, tmp_path: Path) -> Path:
    """Compile sources at once, one after each core; what nothing has changed for is compiled no more.

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

    with folder_of(sanitizers, command, run(*compiler, "--version")) as folder:
        objects = {source: folder / f"{source.stem}.o" for source in sources}
        missing = [source for source, target in objects.items() if not target.exists()]
        target = folder / name
        if missing or not target.exists():

            def compile_one(source: Path) -> None:
                run(*command, "-c", source, "-o", tmp_path / objects[source].name)
                shutil.move(tmp_path / objects[source].name, objects[source])

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, missing))
            run(*command, *objects.values(), "-pthread", "-o", tmp_path / name)
            shutil.move(tmp_path / name, target)
        return target


def engine() -> list[Path]:
    """Sources of the CPU engine, for any processor."""
    widest = ENGINE / "isa" / "avx512.cpp" if _C.instruction_set() == "avx512" else HERE / "wide.cpp"
    return [widest, ENGINE / "isa" / "avx2.cpp", ENGINE / "isa" / "baseline.cpp", *SHARED, *ENGINE.glob("*.cpp")]


def test_engine(tmp_path):
    """Every op, loss and option on random graphs; the program prints its seed."""
    target = program("test_engine", [*engine(), HERE / "test_engine.cpp"], "address,undefined", tmp_path)
    assert "12 graphs" in run(target, seed(), timeout=600)


def test_cuda(tmp_path):
    """The GPU engine's device code as host C++, where a block's threads are fibers, against the CPU engine."""
    sources = [*engine(), HERE / "test_cuda.cpp", HERE / "emulation.cpp"]
    target = program("test_cuda", sources, "address,undefined", tmp_path)
    assert "4 graphs" in run(target, seed(), timeout=600)


def test_queue(tmp_path):
    """The GPU engine's calls that wait in a stream or are captured in a graph, and sizes beyond 32 bits."""
    sources = [*SHARED, HERE / "test_queue.cpp", HERE / "emulation.cpp"]
    assert "done" in run(program("test_queue", sources, "address,undefined", tmp_path), seed(), timeout=600)


def test_tiles(tmp_path):
    """Products in tiles as large as a GPU's, of which the other tests have smaller ones."""
    sources = [HERE / "test_tiles.cpp", HERE / "emulation.cpp"]
    assert "42 products" in run(program("test_tiles", sources, "address,undefined", tmp_path), seed(), timeout=600)


def test_pool(tmp_path):
    target = program("test_pool", [ENGINE / "pool.cpp", HERE / "test_pool.cpp"], "thread", tmp_path)
    assert "done" in run(target, timeout=600)
