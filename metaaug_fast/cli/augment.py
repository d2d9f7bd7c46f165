"""`metaaug-fast augment`: a few pictures a class, and more of each."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..augment import Augmented
from ..report.plots import plot_policy, plot_samples
from ..report.tables import plain
from ..runs.augmenting import LEARNED, REPORT, Enlarged, Judge, enlarge, learned_method
from ..runs.config import Part, configure
from ..runs.fields import parameters_of
from ..runs.methods import METHODS, Method
from ..runs.registry import DATA, find_data, is_data, nearest
from . import options as kind
from .options import Parser, add_machine_options, options_of, use_machine
from .transfer import part_of

_SHEET = {"classes": 10, "real": 5, "generated": 10}
"""What the sheet of samples shows at most."""


def run(arguments: Sequence[str]) -> int:
    """Learn an augmenter or take one, make more of a few pictures, and write an augmented folder and a report."""
    name = arguments[0] if arguments else ""
    if name not in METHODS:
        parser = _parser()
        if not {"-h", "--help"} & set(arguments):
            parser.error(f"METHOD must come first, one of {', '.join(METHODS)} (got {name!r}{nearest(name, METHODS)})")
        parser.parse_args(["--help"])
    parser = _parser(name)
    options, fields = parser.parse_known_args(arguments[1:])
    use_machine(options)
    out: Path = options.out or Path("augmented") / name
    try:
        method = _method(name, options)
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    content: dict[str, Any] = {"learner": {"name": "maml"}, "data": {"name": options.data}}
    if options.size is not None and "size" in _takes(options.data):
        content["data"]["size"] = options.size
    config = configure(content, fields, sections=("data",), others=options_of(parser))
    found = enlarge(
        method,
        config.data,
        out,
        few=options.few,
        test=options.test,
        classes=options.classes,
        per_class=options.per_class,
        pool=_pool(options.pool) if "pool" in options else None,
        learned=getattr(options, "learned", None),
        resume=getattr(options, "resume", False),
        size=options.size,
        minutes=getattr(options, "minutes", None),
        seed=options.seed,
        judge=Judge(options.seeds, options.judge_steps),
        device=options.device,
        progress=not options.quiet,
    )
    if found.new is None:
        assert found.history is not None
        again = ["metaaug-fast", "augment", *arguments, *(["--resume"] * ("--resume" not in arguments))]
        print(f"stopped by {found.history.stopped_by}; to go on: {shlex.join(again)}")
        return 128 + signal.Signals[str(found.history.stopped_by)]
    _show(found, out, options.device)
    return 0


def table(found: Enlarged) -> str:
    """Accuracies, before and after."""
    head = ("trained on", "accuracy on others")
    return plain(head, [(each.way, str(each)) for each in found.figures], numbers=head[1:])


def _show(found: Enlarged, out: Path, device: torch.device) -> None:
    report = found.as_dict() | {"device": str(device), "sheet": "samples.png"}
    plot_samples(_sheet(found), out / "samples.png")
    if isinstance(found.learner, Augmented):
        policy = found.learner.policy
        print(f"\n{policy}")
        plot_policy(policy, out / "policy.png")
        report["policy"] = {
            name: {"probability": chance, "strength": strength} for name, (chance, strength) in policy.as_dict().items()
        }
    if found.figures:
        seeds = len(found.figures[0].accuracies)
        over = f"means over {seeds} seeds, 95 % intervals" if seeds > 1 else "one seed"
        print(f"\n{table(found)}\n  ({over}; equal steps; {report['held_out_pictures']:,} held-out samples)")
    else:
        print("\nnot judged: --test DIR names other pictures of the same classes")
    files.write_json(out / REPORT, report)
    print(f"sheet: {out / 'samples.png'}; report: {out / REPORT}")
    if found.history is not None:
        print(f"for other pictures: metaaug-fast augment {report['augment']} --learned {out / LEARNED} --few DIR")


def _sheet(found: Enlarged) -> dict[str, Tensor]:
    """Real and generated samples of the first classes that have some, in 0..1."""
    few, new = found.few, found.new
    assert new is not None
    rows = [(few.names.index(name), index) for index, name in enumerate(new.names)][: _SHEET["classes"]]
    pairs = [(few.class_samples(one), new.class_samples(other)) for one, other in rows]
    real, made = (min(map(len, each)) for each in zip(*pairs, strict=True))
    return {
        "real": torch.stack([one[: min(real, _SHEET["real"])] for one, _ in pairs]) / 255,
        "generated": torch.stack([other[: min(made, _SHEET["generated"])] for _, other in pairs]) / 255,
    }


def _parser(name: str | None = None) -> Parser:
    learns = name != "distill"
    alone = "" if learns else " Nothing is learned before, and an interrupted run begins anew."
    ways = "\n".join(f"  {each:11} {_first_line(method)}" for each, method in METHODS.items())
    parser = Parser(
        prog=f"metaaug-fast augment{f' {name}' if name else ''}",
        usage=f"metaaug-fast augment {name or 'METHOD'} [--few DIR] [--test DIR] [options] [--any-field VALUE ...]",
        description="Meta-train an augmenter on the classes of a data set, or take one that has learned; make more of "
        "a few pictures a class; write an augmented folder, a sheet of samples and a report, with the accuracy of "
        "classifiers on the originals alone and on all. The fields of the data may be given as for train: --root, ..."
        + alone,
        epilog=None if name else f"methods:\n{ways}\n\nmetaaug-fast augment METHOD --help says more of each",
        formatter_class=argparse.HelpFormatter if name else argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if name is None:
        parser.add_argument("method", choices=METHODS, metavar="METHOD")
        return parser
    parser.add_argument("--data", default="glyphs", metavar="NAME", help=f"to learn from: {', '.join(DATA.names())}, "
        "or module:attribute (glyphs)" if learns else "whose test split the default few are of (glyphs)")  # fmt: skip
    parser.add_argument("--few", metavar="DIR", help="a folder of pictures for each class (classes of the test split)")
    parser.add_argument("--test", metavar="DIR", help="others of the same classes, to judge on (those left of a class)")
    parser.add_argument("--classes", type=kind.count, default=5, metavar="N", help="new ones, without --few (5)")
    parser.add_argument("--per-class", type=kind.count, metavar="N", default=20 if learns else 1,
                        help=f"new samples of each class ({20 if learns else 1})")  # fmt: skip
    parser.add_argument("--size", type=kind.count, metavar="N", help="side that all pictures are brought to")
    if learns:
        parser.add_argument(
            "--learned", type=Path, metavar="FILE", help=f"take the augmenter of an earlier run, its {LEARNED}"
        )
        parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder --out")
        parser.add_argument("--minutes", type=kind.seconds, metavar="N", help="of meta-training at most")
    if name == "retrieve":
        parser.add_argument(
            "--pool", required=True, metavar="NAME=DIR", help="to find samples in; or a folder, or NAME"
        )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder that is written (augmented/{name})")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tasks and new samples (0)")
    parser.add_argument("--seeds", type=kind.count, default=3, help="of classifiers that judge (3)")
    parser.add_argument("--judge-steps", type=kind.count, default=300, metavar="N", help="of each classifier (300)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    types: dict[str, Any] = {"int": int, "float": float, "str": str}
    settings = parser.add_argument_group("settings of the method")
    for each in dataclasses.fields(METHODS[name]):
        settings.add_argument(
            f"--{each.name.replace('_', '-')}", dest=each.name, type=types[str(each.type)], metavar="VALUE",
            default=argparse.SUPPRESS, help=f"{each.metadata['help']} ({each.default})",
        )  # fmt: skip
    add_machine_options(parser)
    return parser


def _first_line(method: type[Method]) -> str:
    return (method.__doc__ or "").splitlines()[0]


def _method(name: str, options: argparse.Namespace) -> Method:
    """Of the settings that are given, and of those that were learned with."""
    names = [each.name for each in dataclasses.fields(METHODS[name])]
    given = {each: getattr(options, each) for each in names if hasattr(options, each)}
    learned = getattr(options, "learned", None)
    return METHODS[name](**given) if learned is None else learned_method(learned, name, given)


def _takes(data: str) -> dict[str, Any]:
    found = find_data(data)
    return {} if is_data(found) else dict(parameters_of(found))


def _pool(text: str) -> Part:
    """A folder, or what `NAME=DIR` or `NAME` names."""
    if Path(text).is_dir():
        return Part("folder", {"root": text})
    if not {"=", ":"} & {*text} and text not in DATA.names():
        near = nearest(text, DATA.names())
        raise ValueError(f"pool must be a folder, or one of {', '.join(DATA.names())} (got {text!r}{near})")
    return part_of("pool", text)
