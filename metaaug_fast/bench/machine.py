"""The machine that a run takes place on, and whether it can take place."""

from __future__ import annotations

import datetime
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .worker import cores

_VERSIONS = ("metaaug_fast", "jax", "higher", "torchopt", "learn2learn", "numpy")


def check_threads(threads: int) -> None:
    """Raise ValueError where there are fewer cores."""
    if threads > cores():
        raise ValueError(f"threads must be at most the {cores()} cores that this process may use (got {threads})")


def check_out(out: Path) -> None:
    """Make the folder; ValueError where it cannot be made or written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written to (got {out}: {error.strerror})") from error


def machine(threads: int) -> dict[str, Any]:
    """What a reader must know of the machine; no host names, no paths."""
    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": threads,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # which names the build, CPU or CUDA, and the installed version need not
        **versions,
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
