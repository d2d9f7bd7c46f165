"""`metaaug-fast train`: a run from a configuration."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runs.config import (
    Config,
    checked_content,
    configure,
    fields_of_run,
    merged,
    named_functions,
    read_yaml,
    recipe,
    recipes,
    with_model,
)
from ..runs.experiment import run as run_experiment
from ..runs.fields import REQUIRED, UNSET, Field, described, spellings
from ..runs.load import interrupted
from ..runs.registry import DATA, LEARNERS, MODELS
from .options import Parser, add_machine_options, options_of, use_machine


def run(arguments: Sequence[str]) -> int:
    """Train, test, and leave a checkpoint and a report."""
    parser = _parser()
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    options, fields = parser.parse_known_args(arguments[named is not None :])
    if options.help:
        print(_help(parser, named, options))
        return 0
    others = options_of(parser)
    if options.resume is None:
        config, resume = _configured(named, options, fields, others), None
    else:
        config, resume = _resumed(named, options, fields, others)
    if options.print_config:
        print(config.as_yaml(), end="")
        return 0
    use_machine(options)
    out = options.out or options.resume or Path("runs") / f"{_file_name(config)}.safetensors"
    outcome = run_experiment(
        config, out, resume=resume, device=options.device, download=options.download, progress=not options.quiet
    )
    if outcome.evaluation is None:
        stopped_by = outcome.history.stopped_by
        again = ["metaaug-fast", "train", config.learner.name, *_own_code(config), "--resume", str(out)]
        print(f"stopped by {stopped_by}; to go on: {shlex.join(again)}")
        return 128 + signal.Signals[str(stopped_by)]
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="metaaug-fast train",
        usage="metaaug-fast train LEARNER --data NAME [options] [--any-field VALUE ...]",
        description="Meta-train, evaluate on new classes, write a checkpoint and a report. "
        f"LEARNER is {', '.join(LEARNERS.names())}, or module:attribute.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="this; with LEARNER and --data, their fields as well")
    parser.add_argument("--data", metavar="NAME", help=f"{', '.join(DATA.names())}, or module:attribute")
    parser.add_argument(
        "--model", metavar="NAME", help=f"{', '.join(MODELS.names())}, or module:attribute (what suits the data)"
    )
    parser.add_argument("--split", metavar="NAME", help="how classes are divided, where there are several ways")
    parser.add_argument("--recipe", metavar="NAME", help="settings to start from (LEARNER-DATA, where there is one)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML, which come before the recipe's")
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings, as YAML for --config, and stop"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="checkpoint (runs/LEARNER-DATA.safetensors)")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="checkpoint to go on from, with its settings")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="MODULE",
        help="with --resume: of your own, whose code the checkpoint names and may run",
    )
    parser.add_argument("--download", action="store_true", help="fetch what the data set lacks")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_machine_options(parser)
    return parser


def _content(named: str | None, options: argparse.Namespace, words: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Names and fields of the recipe, the file and the options, later ones before earlier ones.

    words: whatever else was given, for a learner that stands there.
    """
    names: dict[str, dict[str, Any]] = {
        section: {"name": name}
        for section, name in (("learner", named), ("data", options.data), ("model", options.model))
        if name is not None
    }
    if options.split is not None:
        names.setdefault("data", {})["splits"] = options.split
    file = {} if options.config is None else read_yaml(options.config)
    asked = merged(file, names)
    learner, data = (asked.get(section, {}).get("name") for section in ("learner", "data"))
    chosen = options.recipe
    if chosen is None and f"{learner}-{data}" in recipes():
        chosen = f"{learner}-{data}"
    start: Mapping[str, Any] = {} if chosen is None else recipe(chosen)
    content = merged(start, file, names)
    if "name" not in content.get("learner", {}):
        for word in words:  # behind options, which take it for a value of theirs
            if word in LEARNERS.names() or re.fullmatch(r"[\w.]+:[\w.]+", word):
                raise ValueError(f"the learner must come first: metaaug-fast train {word} ... (got {word} later)")
        raise ValueError(f"LEARNER must be one of {', '.join(LEARNERS.names())}, or module:attribute (got none)")
    if "name" not in content.get("data", {}):
        raise ValueError(f"--data must be one of {', '.join(DATA.names())}, or module:attribute (got none)")
    return content


def _configured(named: str | None, options: argparse.Namespace, fields: Sequence[str], others: Sequence[str]) -> Config:
    if options.allow:
        raise ValueError(f"--allow is for --resume: what you name yourself may run (got --allow {options.allow[0]})")
    config = configure(_content(named, options, fields), fields, others=others)
    pair = f"{config.learner.name}-{config.data.name}"
    if options.recipe is None and pair not in recipes() and not options.print_config:
        print(f"there is no recipe {pair}: what is not given is each constructor's own default")
    return config


def _resumed(
    named: str | None, options: argparse.Namespace, fields: Sequence[str], others: Sequence[str]
) -> tuple[Config, Path]:
    """The checkpoint's configuration, of which little may be other than it was, and the file to go on from."""
    for option, value in (("--config", options.config), ("--recipe", options.recipe), ("--split", options.split)):
        if value is not None:
            raise ValueError(
                f"{option} must not be given with --resume, which has the checkpoint's settings (got {value})"
            )
    given = {"learner": named, "data": options.data, "model": options.model}
    own = [name for name in given.values() if name and ":" in name]
    allow = {*options.allow, *own, *(name.partition(":")[0] for name in own)}
    before = interrupted(options.resume, allow)
    for section, name in given.items():
        part = getattr(before.config, section)
        if name is not None and (part is None or name != part.name):
            option = "learner" if section == "learner" else f"--{section}"
            raise ValueError(f"{option} must be that of the checkpoint, {part and part.name} (got {name})")
    return configure(before.config.as_dict(), fields, allow=allow, others=others), before.path


def _help(parser: Parser, named: str | None, options: argparse.Namespace) -> str:
    """The options, and where a learner and data are named, those of every field."""
    others = options_of(parser)
    try:
        content = _content(named, options)
    except ValueError:
        parser.epilog = "metaaug-fast train LEARNER --data NAME --help lists the fields of these."
        return parser.format_help()
    content = with_model(checked_content(content))
    known = fields_of_run(content)
    names = spellings(known, others)
    for section in dict.fromkeys(each.section for each in known):
        title = " ".join(filter(None, (section, content.get(section, {}).get("name"))))
        group = parser.add_argument_group(title)
        for each in known:
            if each.section == section:
                value = content.get(section, {}).get(each.name, each.default)
                nargs = "?" if each.is_flag else None
                group.add_argument(names[each.key][0], nargs=nargs, metavar="VALUE", help=_about(each, value))
    parser.epilog = (
        "Each field also goes by its section: --learner.inner-lr. Numbers, lists and mappings are written as in YAML: "
        "'[1, 2]', '{head.weight: 0.1}'."
    )
    return parser.format_help()


def _about(field: Field, value: Any) -> str:
    """What a field is, its type, and what it is where it is not given."""
    if value is REQUIRED or value is UNSET:
        default = "required" if value is REQUIRED else "the constructor's own"
    else:
        default = value if isinstance(value, str) else json.dumps(value)
    about = f"{field.help}; " if field.help else ""
    return f"{about}{described(field.type)} ({default})".replace("%", "%%")


def _own_code(config: Config) -> list[str]:
    """What has to be named again with a checkpoint of the user's own code."""
    named = []
    for section, part in (("data", config.data), ("model", config.model)):
        if part is not None and ":" in part.name:
            named += [f"--{section}", part.name]
    for function in named_functions(config):
        named += ["--allow", function]
    return named


def _file_name(config: Config) -> str:
    """A name for the run: of the user's own classes, their attribute."""
    return "-".join(part.name.rpartition(":")[2].lower() for part in (config.learner, config.data))
