"""The console program `metaaug-fast`: which command, and what becomes of its errors."""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from tqdm import tqdm

from ..errors import NonFiniteError, NotFusedError, in_one_line, out_of_memory
from ..runs.registry import nearest
from .options import Parser

COMMANDS = {
    "train": "meta-train, evaluate on new classes, write a checkpoint and a report",
    "evaluate": "how good a checkpoint's learner is on new classes",
    "transfer": "from many sources to a target of few labels: pre-train, meta-train, fine-tune, and compare",
    "augment": "more of a few pictures a class: policy, hallucinate, generate, retrieve or distill, and compare",
    "list": "learners, models, data sets and recipes",
    "explain": "which of a model's ops are fused, and why others are not",
    "demo": "train on letters for a few minutes, evaluate and draw",
    "bench": "time named workloads here and in other libraries, each checked first",
}
"""Each is a module of this name, with `run(arguments) -> exit code`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit code: 0, 2 for bad usage or input, 1 for a failed run, 128 + n for signal n."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given else ""
    if command not in COMMANDS:
        parser = _parser()
        if command and not command.startswith("-"):
            parser.error(f"COMMAND must be one of {', '.join(COMMANDS)} (got {command!r}{nearest(command, COMMANDS)})")
        parser.parse_args(given)  # says what is wrong, or helps
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    module = import_module(f".{command}", __package__)
    try:
        return int(module.run(given[1:]))
    except NonFiniteError as error:
        return _fail(command, str(error), 1)
    except Exception as error:
        if out_of_memory(error):
            return _fail(command, f"not enough memory for {_sizes(given)} ({in_one_line(error)})", 2)
        if isinstance(error, (ValueError, TypeError, OSError, NotFusedError)):
            return _fail(command, str(error), 2)
        raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="metaaug-fast",
        description="Exact, fused few-shot adaptation.",
        epilog=f"commands:\n{lines}\n\nmetaaug-fast COMMAND --help says more of each",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('metaaug_fast')}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    return parser


def _sizes(given: Sequence[str]) -> str:
    """What was asked for, as it is given: all that a call's memory may depend on."""
    shown = []
    for index, option in enumerate(given):
        name, equals, _ = option.partition("=")
        if name.startswith("--") and name.rpartition(".")[2].lstrip("-").replace("-", "_") in _SIZES:
            shown.append(option if equals else " ".join(given[index : index + 2]))
    return ", ".join(shown) or "the sizes of the settings; fewer --tasks need less"


_SIZES = {
    "ways", "shots", "queries", "tasks", "train_ways", "train_shots", "train_queries", "inner_steps", "inner_batch",
    "test_steps", "shape", "samples", "hidden", "widths", "sample_shape", "size",
}  # fmt: skip


def _show_warning(message: Warning | str, *_: Any) -> None:
    tqdm.write(f"metaaug-fast: warning: {message}", file=sys.stderr)


def _fail(command: str, message: str, code: int) -> int:
    print(f"metaaug-fast {command}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
