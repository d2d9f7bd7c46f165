"""What the console program's options may be: text to value, or one sentence why not."""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import platform
from argparse import ArgumentTypeError
from typing import Any, NoReturn

import torch

from ..bench.worker import cores

_COUNTS_END = 2**31  # the engine counts in 31 bits
_THREADS_A_CORE = 8


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """What a parser reads itself."""
    return [name for action in parser._actions for name in action.option_strings]


def add_machine_options(parser: argparse.ArgumentParser, with_device: bool = True) -> None:
    """`--threads` and `--device`, which `use_machine` follows."""
    parser.add_argument("--threads", type=threads, metavar="N", help="(as many as torch takes)")
    if with_device:
        parser.add_argument("--device", type=device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ... (cpu)")


def use_machine(options: argparse.Namespace) -> None:
    """Take as many threads as asked for, and keep the memory that tensors free."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Let glibc keep it for the next tensor, unless the environment tunes it.

    By default it returns large pieces to the system, whose pages are then zeroed again at every layer of every step:
    ordinary torch on the CPU spends up to half of its time so.
    """
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not tuned:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def count(text: str) -> int:
    """An integer >= 1 that the engine can count to."""
    return _integer(text, 1)


def threads(text: str) -> int:
    """A number of threads; far beyond the cores the operating system refuses them, and the process dies of it."""
    value, most = _integer(text, 1, math.inf), _THREADS_A_CORE * cores()
    if value > most:
        raise ArgumentTypeError(f"must be at most {_THREADS_A_CORE} for each of {cores()} cores, {most} (got {text})")
    return value


def finite(text: str, low: float = -math.inf) -> float:
    """A finite number >= `low`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= low):
        at_least = f" >= {low:g}" if math.isfinite(low) else ""
        raise ArgumentTypeError(f"must be a number{at_least} (got {text})")
    return value


def rate(text: str) -> float:
    """A finite number >= 0."""
    return finite(text, 0)


def seconds(text: str) -> float:
    """A finite number above 0."""
    value = rate(text)
    if value == 0:
        raise ArgumentTypeError("must be above 0 (got 0)")
    return value


def shape(text: str) -> tuple[int, ...]:
    """Sizes between commas."""
    return tuple(count(size) for size in text.split(","))


def device(text: str) -> torch.device:
    """The CPU or a GPU that is there."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = torch.device("meta")
    if found.type == "cuda" and (found.index or 0) < torch.cuda.device_count():
        return torch.device("cuda", found.index or 0)
    if found.type != "cpu":
        raise ArgumentTypeError(
            f"must be cpu or one of the GPUs that torch sees, {torch.cuda.device_count()} (got {text})"
        )
    return found


def _integer(text: str, low: int, end: float = _COUNTS_END) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise ArgumentTypeError(f"must be an integer >= {low} (got {text})")
    if value >= end:
        raise ArgumentTypeError(f"must be an integer below 2**31 (got {text})")
    return value
