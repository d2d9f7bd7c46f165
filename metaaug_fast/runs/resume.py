"""What a run's checkpoint holds, and how it is put back: all of it, or nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import CheckpointError
from ..tasks import TaskBatch
from . import checkpoint as checkpoints
from .history import History


class Resumable(Protocol):
    """An endless stream of batches that can say where it stands, as `data.Episodes` is."""

    def __next__(self) -> TaskBatch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Run:
    """All that a checkpoint holds, with torch's CPU generator."""

    learner: nn.Module
    episodes: Resumable
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LRScheduler]
    config: dict[str, Any]
    step: int = 0
    history: History = field(default_factory=History)

    def save(self, path: str | Path) -> None:
        """Write the checkpoint."""
        checkpoints.save(path, self._state())

    def try_saving(self, path: str | Path) -> None:
        """See whether `save` will succeed; room is asked for two moments of every weight, as Adam keeps."""
        weights = [each for optimizer in self.optimizers if not optimizer.state for each in parameters_of(optimizer)]
        checkpoints.try_saving(path, self._state(), more=2 * sum(each.nbytes for each in weights))

    def resume(self, path: str | Path) -> Path:
        """Go on from the checkpoint at `path`, or from the one before it where that is damaged; from which.

        Raises:
            FileNotFoundError: there is none. CheckpointError: both are damaged, or it does not fit; nothing has
                changed.
        """
        state, path = checkpoints.load_or_previous(path)
        try:
            self._restore(state)
        except Exception as error:  # Parts of the caller's own may raise anything.
            reason = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise CheckpointError(f"{path} does not fit what is to be resumed ({reason})") from error
        return path

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "step": self.step,
            "episodes": self.episodes.state_dict(),
            "learner": self.learner.state_dict(),
            **{name: [part.state_dict() for part in parts] for name, parts in self._torch_parts().items()},
            "kinds": {name: [type(part).__name__ for part in parts] for name, parts in self._torch_parts().items()},
            "generator": torch.get_rng_state(),
            "history": self.history.as_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        state = _upgraded(state)
        step, history = state["step"], History.from_dict(state["history"])
        check_stored_count("step", step)
        torch.Generator().set_state(state["generator"])  # refuses what is no state
        self._check(state)
        pairs: list[tuple[Any, Any]] = [(self.episodes, state["episodes"]), (self.learner, state["learner"])]
        for name, parts in self._torch_parts().items():
            pairs += zip(parts, state[name], strict=True)
        before = [copy.deepcopy(part.state_dict()) for part, _ in pairs]
        try:
            for part, own in pairs:
                part.load_state_dict(own)
        except Exception:
            for (part, _), own in zip(pairs, before, strict=True):
                part.load_state_dict(own)
            raise
        torch.set_rng_state(state["generator"])
        history.stopped_by = None
        self.step, self.history = step, history

    def _check(self, state: Mapping[str, Any]) -> None:
        check_state(self.learner, state["learner"])
        for name, parts in self._torch_parts().items():
            kinds = [type(part).__name__ for part in parts]
            wanted = state["kinds"].get(name, kinds)
            if kinds != wanted:
                raise ValueError(f"{name} must be {', '.join(wanted) or 'none'} (got {', '.join(kinds) or 'none'})")
            for part, own in zip(parts, state[name], strict=True):
                _CHECKS[name](part, own)

    def _torch_parts(self) -> dict[str, Sequence[Any]]:
        return {"optimizers": self.optimizers, "schedulers": self.schedulers}


def _upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state of version 1 or 2, which had one optimizer and one scheduler or none, as one of today."""
    if "optimizer" not in state:
        return state
    if state["optimizer"] is None:
        raise ValueError(
            "an older metaaug_fast wrote it, whose learner had no optimizer: it can be loaded, but not gone on from"
        )
    old = {name: state[name] for name in ("optimizer", "scheduler")}
    kinds = {f"{name}s": [kind] for name, kind in state.get("kinds", {}).items() if old[name] is not None}
    lists = {f"{name}s": [] if each is None else [each] for name, each in old.items()}
    return {**state, **lists, "kinds": kinds}


def check_state(learner: nn.Module, state: Any) -> None:
    """ValueError unless `state` has the learner's tensors, with their shapes and dtypes."""
    # A module judges its extra state itself.
    own, given = (
        {name: value for name, value in each.items() if not name.endswith("_extra_state")}
        for each in (learner.state_dict(), state)
    )
    _check_same("learner", own, given)


def check_stored_count(name: str, value: Any) -> None:
    """ValueError unless it is an integer >= 0, or a tensor that holds one."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, float) and isinstance(value, Tensor) and math.isfinite(number) and number == int(number):
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"{name} must be an integer >= 0 (got {number!r})")


def _check_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Wrong shapes end a fused optimizer in a crash of the process, so they are compared with what its step makes."""
    expected = _stepped(optimizer, state["param_groups"])["state"]
    for index, given in state["state"].items():
        if index not in expected:
            raise ValueError(f"optimizer has no parameter {index}")
        _check_same(f"optimizer.{index}", _without_none(expected[index]), _without_none(given))
        if isinstance(given, Mapping) and "step" in given:
            check_stored_count(f"optimizer.{index}.step", given["step"])


def _stepped(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a copy of the optimizer with these settings keeps after a step, of gradients that are 0."""
    memo: dict[int, Any] = {}
    twin = copy.deepcopy(optimizer, memo)
    for name, value in vars(optimizer).items():
        # torch copies its own attributes only, and a scheduler has put its own `step` on the optimizer.
        if name not in vars(twin) and not callable(value):
            setattr(twin, name, copy.deepcopy(value, memo))
    twin.load_state_dict({"state": twin.state_dict()["state"], "param_groups": copy.deepcopy(list(groups))})
    for parameter in parameters_of(twin):
        parameter.grad = torch.zeros_like(parameter)
    twin.step()
    return twin.state_dict()


def _check_scheduler(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    own = scheduler.state_dict()
    # Names that begin with _ come and go with torch's versions.
    _check_names("scheduler", *({name for name in each if not name.startswith("_")} for each in (own, state)))
    for name, value in own.items():
        if isinstance(value, list) and name in state:
            _check_same(f"scheduler.{name}", value, state[name])
    for name in {"last_epoch", "_step_count"} & set(state):
        check_stored_count(f"scheduler.{name}", state[name])


def _check_same(name: str, own: Any, given: Any) -> None:
    """ValueError unless both have the same form: names, lengths, and tensors' shapes and dtypes."""
    if isinstance(own, Tensor):
        if not isinstance(given, Tensor) or (own.shape, own.dtype) != (given.shape, given.dtype):
            raise ValueError(f"{name} must be {_form(own)} (got {_form(given)})")
    elif isinstance(own, Mapping):
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} must be a dict (got {_form(given)})")
        _check_names(name, set(own), set(given))
        for key, value in own.items():
            _check_same(f"{name}.{key}", value, given[key])
    elif isinstance(own, (list, tuple)):
        if not isinstance(given, (list, tuple)) or len(own) != len(given):
            raise ValueError(f"{name} must have {len(own)} entries (got {_form(given)})")
        for index, (one, other) in enumerate(zip(own, given, strict=True)):
            _check_same(f"{name}.{index}", one, other)
    elif isinstance(own, (int, float)) and not isinstance(given, (int, float)):
        raise ValueError(f"{name} must be a number (got {_form(given)})")


def _check_names(name: str, own: set[Any], given: set[Any]) -> None:
    for what, names in (("lacks", own - given), ("must not have", given - own)):
        if names:
            shown = ", ".join(sorted(map(str, names))[:3])
            raise ValueError(f"{name} {what} {shown}{', ...' if len(names) > 3 else ''}")


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype}"
    return f"{len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__


_CHECKS: Mapping[str, Callable[[Any, Any], None]] = {"optimizers": _check_optimizer, "schedulers": _check_scheduler}


def _without_none(state: Any) -> Any:
    """torch's versions differ in what they keep as None and what they leave out."""
    return {name: value for name, value in state.items() if value is not None} if isinstance(state, Mapping) else state


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """All that the optimizer steps."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
