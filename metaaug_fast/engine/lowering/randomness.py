"""Whether a piece of code draws random numbers, which a list of ops cannot repeat."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:  # then torch's generator is watched like the others
    TorchDispatchMode = None  # type: ignore[assignment, misc]


class DrawsWatch:
    """Sees what the code inside of `with` draws.

    drawn: numbers of torch, by this thread. moved: whether the generators of Python, NumPy and, with a torch that does
    not show its calls, of torch moved, or torch was seeded, by whichever thread.

    Args:
        counts: asked at each draw of torch's, whether it counts.

    >>> with DrawsWatch() as watch:
    ...     _ = torch.rand(2)
    >>> watch.drawn or watch.moved
    True
    """

    def __init__(self, counts: Callable[[], bool] = lambda: True) -> None:
        self.drawn = self.moved = False
        self._counts = counts
        self._calls = None if TorchDispatchMode is None else _Calls(self)

    def __enter__(self) -> DrawsWatch:
        self._before = _states()
        if self._calls is not None:
            self._calls.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._calls is not None:
            self._calls.__exit__(kind, error, trace)
        self.moved = _states() != self._before

    def see(self, tags: Any) -> None:
        """Take note of a call of torch's."""
        self.drawn |= torch.Tag.nondeterministic_seeded in tags and self._counts()


if TorchDispatchMode is not None:

    class _Calls(TorchDispatchMode):
        def __init__(self, watch: DrawsWatch) -> None:
            super().__init__()
            self.watch = watch

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            self.watch.see(func.tags)
            return func(*args, **(kwargs or {}))


def _states() -> list:
    states: list = [torch.initial_seed(), random.getstate()]
    if TorchDispatchMode is None:
        states.append(bytes(torch.get_rng_state().tolist()))
    if "numpy" in sys.modules:
        _, keys, position, *_ = sys.modules["numpy"].random.get_state()
        states += [keys.tobytes(), position]
    return states
