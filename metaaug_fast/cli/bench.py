"""`metaaug-fast bench`: the benchmark suite."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from ..bench import workloads
from ..bench.rivals import RIVALS
from ..bench.scaling import scaling
from ..bench.suite import bench
from . import options as kind
from .options import Parser


def run(arguments: Sequence[str]) -> int:
    """Time workloads, or show how time grows."""
    options = _parser().parse_args(arguments)
    if options.list:
        for workload in workloads.WORKLOADS.values():
            print(f"{'*' if workload.core else ' '} {workload.name:40} {workload}")
        print("* in the default run")
        return 0
    if options.scaling and options.threads is not None:
        raise ValueError(f"threads must not be given with --scaling, which takes 1 and 2 (got {options.threads})")
    settings = {"rounds": options.rounds, "first_call_limit": options.first_call_limit}
    if options.rivals is not None:
        settings["rivals"] = options.rivals
    if not options.quiet:
        settings["say"] = _say
    with _ended_by_sigterm():
        if options.scaling:
            print(scaling(options.out, **settings), end="")
        else:
            selected = workloads.select(options.workloads or (), options.all)
            try:
                report = bench(selected, options.out, threads=options.threads, **settings)
            except (KeyboardInterrupt, SystemExit):
                _say(f"stopped; finished workloads are in {options.out / 'bench.json'}")
                raise
            print(report)
    name = "scaling" if options.scaling else "bench"
    print("written: " + ", ".join(str(options.out / f"{name}.{suffix}") for suffix in ("md", "json", "png")))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="metaaug-fast bench",
        description="Time named workloads here and in other libraries, each checked first.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--workloads", nargs="+", metavar="NAME", help="names or shell patterns (a core set)")
    what.add_argument("--all", action="store_true", help="every workload")
    what.add_argument("--list", action="store_true", help="print the workloads and stop")
    what.add_argument("--scaling", action="store_true", help="growth with tasks, steps and threads instead")
    parser.add_argument("--rivals", nargs="+", metavar="NAME", help=f"{', '.join(RIVALS)} (all)")
    parser.add_argument("--rounds", type=kind.count, default=9, help="in which rivals take turns (9)")
    parser.add_argument("--first-call-limit", type=kind.seconds, default=300.0, metavar="SECONDS", help="(300)")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for table, JSON and picture (bench)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--threads", type=kind.count, help="of every rival (as many as there are cores)")
    return parser


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that what was started is ended too."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
