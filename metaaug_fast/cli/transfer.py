"""`metaaug-fast transfer`: from many sources to a target of few labels."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..data import ClassSamples
from ..report.tables import plain
from ..runs.build import make_sources
from ..runs.config import Part, configure
from ..runs.fields import REQUIRED, parameters_of
from ..runs.registry import DATA, MODELS, find_data, is_data
from ..runs.transfer import WAYS, Recipe, Transferred, transfer
from . import options as kind
from .options import Parser, add_machine_options, options_of, use_machine

# The paper's rate, 0.01, is for 640 features; of some dozens a head learns little by it.
_LEARNER = {"name": "meta_transfer", "inner_lr": 0.1, "inner_steps": 10}


def run(arguments: Sequence[str]) -> int:
    """Learn from the sources, then from few labels of the target; print how good that is, and write a report."""
    parser = _parser()
    options, fields = parser.parse_known_args(arguments)
    use_machine(options)
    content: dict[str, Any] = {"learner": _LEARNER, "data": {"name": options.target}}
    if options.model is not None:
        content["model"] = {"name": options.model}
    config = configure(content, fields, sections=("learner", "model", "data"), others=options_of(parser))
    recipe = Recipe(**{each.name: getattr(options, each.name) for each in dataclasses.fields(Recipe)})
    parts = _parts(options.sources)
    files.try_writing(options.out)
    sources = {name: _data("sources", part) for name, part in parts.items()}
    target = _data("target", config.data)
    found = transfer(
        config,
        sources,
        target,
        options.shots,
        seeds=options.seeds,
        recipe=recipe,
        convert=options.convert,
        device=options.device,
        progress=not options.quiet,
    )
    print(f"\n{table(found)}")
    over = (
        f"means over {found.seeds} seeds, 95 % intervals, differences seed by seed" if found.seeds > 1 else "one seed"
    )
    print(f"  ({over}; {found.pictures:,} held-out samples of {found.target}, not transductive)")
    for way, text in WAYS.items():
        print(f"  {way}: {text}")
    files.write_json(options.out, found.as_dict() | {"device": str(options.device)})
    print(f"report: {options.out}")
    return 0


def table(found: Transferred) -> str:
    """Accuracies, and differences in pairs of a seed: a row for each way, a column for each number of labels."""
    figures = [*found.figures, *found.gains()]
    shots, ways = (list(dict.fromkeys(getattr(each, name) for each in figures)) for name in ("shots", "way"))
    cells = {(each.way, each.shots): str(each) for each in figures}
    head = ("target accuracy", *(f"{count} a class" for count in shots))
    return plain(head, [(way, *(cells[way, count] for count in shots)) for way in ways], numbers=head[1:])


def _parser() -> Parser:
    parser = Parser(
        prog="metaaug-fast transfer",
        usage="metaaug-fast transfer --sources NAME=DIR,NAME,... --target NAME [options] [--any-field VALUE ...]",
        description="Pre-train on the classes of many sources, meta-train scales and shifts, fine-tune on few labels "
        "of a target; beside the same network from scratch, with a new head alone, and fine-tuned in the plain way. "
        "The fields of the target's data, the model and the learner may be given as for train: --root, --size, "
        "--hidden, --inner-lr (0.1), --inner-steps (10), ...",
        allow_abbrev=False,
    )
    names = f"{', '.join(DATA.names())}, or module:attribute"
    parser.add_argument(
        "--sources", required=True, metavar="NAME=DIR,...", help="between commas; DIR where a data set lies in a folder"
    )
    parser.add_argument("--target", required=True, metavar="NAME", help=f"{names}; its folder is --root")
    parser.add_argument("--model", metavar="NAME", help=f"{', '.join(MODELS.names())} (what suits the target)")
    parser.add_argument("--shots", type=counts, default=(5,), help="labels a class, or several numbers: 1,5,20 (5)")
    parser.add_argument("--seeds", type=kind.count, default=5, help="of weights, labels and tasks (5)")
    parser.add_argument("--convert", action="store_true", help="bring sources of other shapes to the target's")
    parser.add_argument("--out", type=Path, default=Path("transfer.json"), metavar="FILE", help="(transfer.json)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    types: dict[str, Any] = {"int": kind.count, "float": kind.rate, "str": str}
    hints = typing.get_type_hints(Recipe)
    for each in dataclasses.fields(Recipe):
        option, about = _option(each.name), each.metadata["help"]
        if hints[each.name] is bool:
            parser.add_argument(option, dest=each.name, action="store_true", help=about)
        else:
            shown = f"{about} ({each.default})"
            parser.add_argument(
                option, dest=each.name, type=types[str(each.type)], default=each.default, metavar="VALUE", help=shown
            )
    add_machine_options(parser)
    return parser


def counts(text: str) -> tuple[int, ...]:
    """Integers >= 1 between commas."""
    return tuple(kind.count(each) for each in text.split(","))


def _option(name: str) -> str:
    return "--lambda" if name == "target_weight" else f"--{name.replace('_', '-')}"


def _parts(text: str) -> dict[str, Part]:
    """What `NAME=DIR,NAME` names."""
    parts: dict[str, Part] = {}
    for each in text.split(","):
        part = part_of("sources", each)
        if part.name in parts:
            raise ValueError(f"sources must be named once (got {part.name} twice)")
        parts[part.name] = part
    return parts


def part_of(called: str, text: str) -> Part:
    """What `NAME=DIR` or `NAME` names."""
    name, equals, folder = text.partition("=")
    found = find_data(name)
    takes = {} if is_data(found) else parameters_of(found)
    if equals and "root" not in takes:
        raise ValueError(f"{called} must have a folder only where data lie in one (got {text})")
    if not equals and "root" in takes and takes["root"].default is REQUIRED:
        raise ValueError(f"{called} must say where {name} lies, {name}=DIR (got {text})")
    return Part(name, {"root": folder} if equals else {})


def _data(called: str, part: Part) -> ClassSamples:
    """All classes of a data set."""
    source = make_sources(part, ["all"])["all"]
    if not isinstance(source, ClassSamples) or source.ids:
        raise ValueError(f"{called} must be labelled samples of numbers (got {part.name})")
    return source
