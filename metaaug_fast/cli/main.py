"""The console program `metaaug-fast`."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from tqdm import tqdm

from .. import files
from ..bench import workloads
from ..bench.rivals import RIVALS
from ..bench.scaling import scaling
from ..bench.suite import bench
from ..data import Episodes
from ..errors import CheckpointError, NonFiniteError, NotFusedError, in_one_line, out_of_memory
from ..inspect.explanation import explain
from ..learners.gradient import Learner
from ..report.plots import plot_episode, plot_sinusoid
from ..runs import checkpoint as checkpoints
from ..runs import recipes
from ..runs.evaluation import Evaluation, evaluate
from ..runs.history import History
from ..runs.recipes import Settings
from ..runs.resume import check_count, check_learner
from ..runs.training import train
from . import option_types as kind
from .demo import demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit code: 0, 2 for bad usage or input, 1 for a failed run, 128 + n for signal n."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        return int(options.run(options))
    except NonFiniteError as error:
        return _fail(options, str(error), 1)
    except Exception as error:
        if out_of_memory(error):
            return _fail(options, f"not enough memory for {_sizes(options)} ({in_one_line(error)})", 2)
        if isinstance(error, (ValueError, TypeError, OSError, NotFusedError)):
            return _fail(options, str(error), 2)
        raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _train(options: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
    if options.resume is not None:
        resume, run = _resumed(options.resume, given)
    elif "data" not in given:
        raise ValueError(f"--data must be one of {', '.join(recipes.DATA)} (got none)")
    else:
        resume, run = None, recipes.settings(**given)
    out = options.out or options.resume or Path("runs") / f"{run.learner}-{run.data}.safetensors"
    with files.claimed(out):
        return _train_to(out, options, run, resume)


def _train_to(out: Path, options: argparse.Namespace, run: Settings, resume: _Resumed | None) -> int:
    report = _beside(out, ".json")
    files.try_writing(report)
    learner = recipes.make_learner(run, options.device)
    episodes = {split: recipes.make_episodes(run, split, options.download, options.device) for split in recipes.SPLITS}
    done = replace(run, steps=max(run.steps, resume.step)) if resume else run
    print(f"{done}; {_where(options.device)}")
    history = train(
        learner,
        episodes["train"],
        run.steps,
        optimizer=recipes.make_optimizer(run, learner),
        before_step=recipes.make_schedule(run, learner),
        validate=lambda: evaluate(learner, episodes["validation"], options.validation_episodes, steps=run.test_steps),
        validate_every=options.validate_every or math.ceil(run.steps / 10),
        checkpoint=out,
        checkpoint_every=options.checkpoint_every or min(500, math.ceil(run.steps / 10)),
        resume=resume and resume.path,
        config=done.as_dict(),
        progress=not options.quiet,
    )
    print(f"checkpoint: {out}")
    if history.stopped_by is not None:
        again = f"metaaug-fast train {run.learner} --resume {out}{_model_option(run)}"
        print(f"stopped by {history.stopped_by}; to go on: {again}")
        return 128 + signal.Signals[history.stopped_by]
    result = _test(run, learner, options.episodes, episodes["test"])
    _report(report, done, options.device, result, history)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    path, state = options.checkpoint, checkpoints.load(options.checkpoint)
    names = ("data", "root", "ways", "shots", "queries", "tasks", "split_styles", "test_steps")
    run = _settings_of(path, state, options.model)
    report = options.report or _beside(path, ".evaluation.json")
    for target in filter(None, (report, options.plot)):
        if os.path.realpath(target) == os.path.realpath(path):
            raise ValueError(f"--report and --plot must be other files than the checkpoint (got {target})")
        files.try_writing(target)
    try:
        learner = recipes.make_learner(run, options.device)
        check_learner(learner, state["learner"])
        learner.load_state_dict(state["learner"])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit its model {run.model} ({' '.join(str(error).split())})") from error
    run = replace(run, **{name: value for name, value in vars(options).items() if name in names})
    print(f"{path}: {run}")
    episodes = recipes.make_episodes(run, "test", options.download, options.device)
    result = _test(run, learner, options.episodes, episodes)
    if options.plot is not None:
        _plot(run, learner, result.steps, options.plot)
    _report(report, run, options.device, result)
    return 0


def _explain(options: argparse.Namespace) -> int:
    default = (1,) if options.model == "mlp" else (1, 28, 28)
    model = recipes.make_model(options.model).to(options.device)
    print(explain(model, torch.randn(options.samples, *(options.shape or default), device=options.device)))
    return 0


def _demo(options: argparse.Namespace) -> int:
    demo(options.out, steps=options.steps, progress=not options.quiet)
    return 0


def _bench(options: argparse.Namespace) -> int:
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


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that what was started is ended too."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _test(run: Settings, learner: Learner, count: int, episodes: Episodes) -> Evaluation:
    regression = run.data == "sinusoid"
    result = evaluate(learner, episodes, count, steps=run.test_steps, by_step=regression)
    print(f"new {'tasks' if regression else 'classes'}: {result}")
    if regression:
        print("  after 0, 1, ... steps: " + ", ".join(f"{value:.4f}" for value in result.by_step))
    return result


@torch.no_grad()
def _plot(run: Settings, learner: Learner, steps: int, path: Path) -> None:
    """The first episode, or the first sinusoids before adaptation, after one step and after all of them."""
    regression = run.data == "sinusoid"
    tasks = recipes.make_episodes(replace(run, queries=200) if regression else run, "test").batch(0)
    there = tasks.to(next(learner.parameters()).device)
    curves = {
        number: learner.adapt(there.support_x, there.support_y, steps=number)(there.query_x).cpu()
        for number in ({0, 1, steps} if regression else {steps})
    }
    if regression:
        plot_sinusoid(tasks, curves, path)
    else:
        plot_episode(tasks, curves[steps], path)
    print(f"picture: {path}")


class _Resumed(NamedTuple):
    """The checkpoint to go on from, and its meta-steps."""

    path: Path
    step: int


def _resumed(path: Path, given: dict[str, Any]) -> tuple[_Resumed, Settings]:
    """The checkpoint's settings; only the number of steps and the place of the data may be others."""
    state, source = checkpoints.load_or_previous(path)
    run = _settings_of(source, state, given.get("model"))
    for name, value in given.items():
        if name not in ("steps", "root") and getattr(run, name) != value:
            option = "learner" if name == "learner" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} must be that of the checkpoint, {getattr(run, name)} (got {value})")
    try:
        check_count("step", state["step"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{source} was not written by metaaug-fast train ({error})") from error
    return _Resumed(source, state["step"]), replace(run, **given)


def _settings_of(path: Path, state: dict[str, Any], model: str | None) -> Settings:
    try:
        return recipes.settings_from_file(state["config"], model)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} was not written by metaaug-fast train ({error})") from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def _model_option(run: Settings) -> str:
    """What has to be given again with a checkpoint of the user's own model."""
    return "" if run.model in recipes.MODELS else f" --model {run.model}"


def _beside(path: Path, suffix: str) -> Path:
    """Where a report lies; never at `path` itself, and another one for `lr0.1` than for `lr0.2`."""
    return path.with_suffix(suffix) if path.suffix == ".safetensors" else path.with_name(path.name + suffix)


def _report(
    path: Path, run: Settings, device: torch.device, result: Evaluation, history: History | None = None
) -> None:
    content: dict[str, Any] = {
        "versions": {"metaaug_fast": version("metaaug_fast"), "torch": torch.__version__},
        "device": str(device),
        "threads": torch.get_num_threads(),
        "settings": run.as_dict(),
        "evaluation": result.as_dict(),
    }
    if history is not None:
        content["history"] = history.as_dict()
    files.write_json(path, content)
    print(f"report: {path}")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="metaaug-fast", description="Exact, fused few-shot adaptation.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('metaaug_fast')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="meta-train, evaluate on new classes, write a checkpoint and a report")
    command.set_defaults(run=_train)
    command.add_argument("learner", choices=recipes.LEARNERS)
    command.add_argument("--data", choices=recipes.DATA, default=argparse.SUPPRESS)
    _add_episode_options(command)
    keep = argparse.SUPPRESS
    command.add_argument("--model", default=keep, help=f"{', '.join(recipes.MODELS)}, or module:attribute")
    command.add_argument("--steps", type=kind.count, default=keep, help="meta-steps, those before --resume included")
    command.add_argument("--inner-lr", type=kind.rate, default=keep)
    command.add_argument("--inner-steps", type=kind.count, default=keep)
    command.add_argument("--inner-batch", type=kind.count, default=keep, help="samples in an inner step (reptile)")
    command.add_argument("--train-shots", type=kind.count, default=keep, help="shots in training (reptile)")
    command.add_argument("--meta-lr", type=kind.rate, default=keep)
    command.add_argument("--first-order", action="store_true", default=keep, help="FOMAML")
    command.add_argument("--seed", type=int, default=keep)
    command.add_argument("--out", type=Path, help="checkpoint (runs/LEARNER-DATA.safetensors)")
    command.add_argument("--resume", type=Path, help="checkpoint to go on from, with its settings")
    command.add_argument("--validate-every", type=kind.count, metavar="STEPS")
    command.add_argument("--validation-episodes", type=kind.episodes, default=200, metavar="N")
    command.add_argument("--checkpoint-every", type=kind.count, metavar="STEPS")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_common_options(command)

    command = commands.add_parser("evaluate", help="accuracy of a checkpoint on new classes")
    command.set_defaults(run=_evaluate)
    command.add_argument("checkpoint", type=Path)
    command.add_argument("--model", help="the checkpoint's module:attribute, whose code will run")
    _add_episode_options(command)
    command.add_argument("--report", type=Path, help="JSON report (CHECKPOINT.evaluation.json)")
    command.add_argument("--plot", type=Path, help="picture of the first episode, or of three sinusoids")
    _add_common_options(command)

    command = commands.add_parser("explain", help="which of a model's ops are fused, and why others are not")
    command.set_defaults(run=_explain)
    command.add_argument("--model", required=True, help=f"{', '.join(recipes.MODELS)}, or module:attribute")
    command.add_argument("--shape", type=kind.shape, help="of a sample (1,28,28; 1 for mlp)")
    command.add_argument("--samples", type=kind.count, default=25, help="of a task, which matters on a GPU (25)")
    command.add_argument("--threads", type=kind.threads)
    _add_device_option(command)

    command = commands.add_parser("demo", help="train on letters for a few minutes, evaluate and draw")
    command.set_defaults(run=_demo)
    command.add_argument("--out", type=Path, default=Path("demo"), help="folder for pictures and checkpoint")
    command.add_argument("--steps", type=kind.count, default=300, help="meta-steps")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.add_argument("--threads", type=kind.threads)

    command = commands.add_parser("bench", help="time named workloads here and in other libraries, each checked first")
    command.set_defaults(run=_bench)
    what = command.add_mutually_exclusive_group()
    what.add_argument("--workloads", nargs="+", metavar="NAME", help="names or shell patterns (a core set)")
    what.add_argument("--all", action="store_true", help="every workload")
    what.add_argument("--list", action="store_true", help="print the workloads and stop")
    what.add_argument("--scaling", action="store_true", help="growth with tasks, steps and threads instead")
    command.add_argument("--rivals", nargs="+", metavar="NAME", help=f"{', '.join(RIVALS)} (all)")
    command.add_argument("--rounds", type=kind.count, default=9, help="in which rivals take turns (9)")
    command.add_argument("--first-call-limit", type=kind.seconds, default=300.0, metavar="SECONDS", help="(300)")
    command.add_argument("--out", type=Path, default=Path("bench"), help="folder for table, JSON and picture (bench)")
    command.add_argument("--quiet", action="store_true", help="no progress")
    command.add_argument("--threads", type=kind.count, help="of every rival (as many as there are cores)")
    return parser


def _add_episode_options(command: argparse.ArgumentParser) -> None:
    """Options that have the recipe's (or the checkpoint's) value unless they are given."""
    keep = argparse.SUPPRESS
    command.add_argument("--root", default=keep, metavar="DIR", help="folder of Omniglot's archives")
    command.add_argument("--download", action="store_true", help="fetch Omniglot's archives into --root")
    for name, text in (("ways", "classes a task"), ("shots", "support samples a class"), ("queries", "a class")):
        command.add_argument(f"--{name}", type=kind.count, default=keep, help=text)
    command.add_argument("--tasks", type=kind.count, default=keep, help="a batch")
    command.add_argument(
        "--split-styles", action="store_true", default=keep, help="queries in other typefaces (glyphs)"
    )
    command.add_argument("--test-steps", type=kind.count, default=keep, help="inner steps in evaluation")


def _add_common_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--episodes", type=kind.episodes, default=600, help="to evaluate on (600)")
    command.add_argument("--threads", type=kind.threads, help="(as many as torch takes)")
    _add_device_option(command)


def _add_device_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", type=kind.device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ... (cpu)")


def _where(device: torch.device) -> str:
    return f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _show_warning(message: Warning | str, *_: Any) -> None:
    _say(f"metaaug-fast: warning: {message}")


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _sizes(options: argparse.Namespace) -> str:
    """What was asked for, as it is given: all that a call's memory may depend on."""
    names = ("ways", "shots", "train_shots", "queries", "tasks", "inner_steps", "inner_batch", "test_steps", "shape")
    given = {name: value for name, value in vars(options).items() if name in (*names, "samples")}
    shown = (
        f"--{name.replace('_', '-')} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in given.items()
        if value is not None
    )
    return ", ".join(shown) or "the sizes of the settings; fewer --tasks need less"


def _fail(options: argparse.Namespace, message: str, code: int) -> int:
    print(f"metaaug-fast {options.command}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
