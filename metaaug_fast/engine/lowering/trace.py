"""nn.Module -> a short list of ops from the table that the fused engine knows.

The module is traced once with `torch.fx`. Every call that the trace meets is checked on the spot against
`table.py`, with shapes per sample and an unknown batch size; what is not certain to mean the same is refused, with
the place and the reason.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import linecache
import math
import operator
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..exclusive import ONE_AT_A_TIME
from . import table as op_table
from .graph import Graph, LoweringError, Op, Refusal, Survey
from .randomness import DrawsWatch
from .snapshot import Snapshot
from .table import (
    BATCH,
    FUNCTIONS,
    MODULES,
    RANKS,
    UNKNOWN,
    Constant,
    ParameterName,
    Refused,
    Shape,
    Storage,
    Value,
    batched,
    check_fresh,
    describe,
    spatial_or_flat,
)


def lower(
    model: nn.Module, sample_shape: Sequence[int], *, fixed_statistics: bool = False, drop: bool = False
) -> Graph:
    """The op list of `model` for inputs `[N, *sample_shape]`, for any N.

    What Python decides in `forward` (`self.training`, the number of layers, a shape) is decided now: lower again before
    each use. While no attribute of a module has changed the last graph is returned, at little cost; only what `forward`
    reads from outside of the module can change unnoticed.

    Parameters shared by several layers appear under their one name in `model.named_parameters()`.

    Args:
        sample_shape: of one input: `(F,)` or `(C, H, W)`.
        fixed_statistics: batch norm uses the running statistics (`Op.buffers`, the live tensors), not the batch's.
        drop: dropout drops. A dropout that `eval()` or `training=False` has switched off stays off.

    Raises:
        LoweringError: the module holds an op, a hook or control flow that cannot be lowered for certain.

    >>> from torch import nn
    >>> graph = lower(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU()), (3, 2, 2))
    >>> [(op.kind, op.shape) for op in graph.ops]
    [('flatten', (12,)), ('linear', (4,)), ('relu', (4,))]
    """
    key = (tuple(sample_shape), fixed_statistics, drop, *_surroundings())
    with ONE_AT_A_TIME:
        remembered = _LOWERED.setdefault(model, {})
        if key not in remembered or remembered[key][0].change():
            found = survey(model, sample_shape, fixed_statistics=fixed_statistics, drop=drop)
            remembered[key] = Snapshot(model), found
            if not remembered[key][0].complete:
                del remembered[key]
        else:
            found = remembered[key][1]
    if found.graph is None:
        raise LoweringError(str(found.blocker))
    return found.graph


_LOWERED: weakref.WeakKeyDictionary[nn.Module, dict[tuple, tuple[Snapshot, Survey]]] = weakref.WeakKeyDictionary()


def survey(
    model: nn.Module,
    sample_shape: Sequence[int],
    *,
    fixed_statistics: bool = False,
    drop: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Survey:
    """What `lower` meets, without raising; it goes on behind a refused call whose output shape can be found.

    dtype: of the input.
    """
    with ONE_AT_A_TIME:
        for pause in _PAUSES:
            trace = _Trace(model, tuple(sample_shape), fixed_statistics, drop, dtype)
            found = trace.survey()
            if not trace.generators_moved:
                break
            time.sleep(pause)  # another thread may have drawn; what draws itself draws every time
    return found


_PAUSES = (0, 0.001, 0.01, 0.1, 0)


class _Stop(Exception):
    """The trace cannot go on."""


class SymbolicTensor(fx.Proxy):
    """A proxy that knows its shape per sample, so that shapes may steer Python; the batch size and values may not."""

    tracer: _Trace

    @property
    def shape(self) -> tuple:
        return self.tracer.shape_of(self)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __iadd__(self, other: Any) -> fx.Proxy:  # fx would take `x += y` for `x = x + y`
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, SymbolicTensor) else len(value)


def _is_instance(value: Any, classes: Any) -> bool:
    if isinstance(value, SymbolicTensor):
        return isinstance(value.tracer.example_of(value), classes)
    return isinstance(value, classes)


def _is_tensor(value: Any) -> bool:
    return _is_instance(value, Tensor)


def _batch_size(input: Any) -> object:
    return BATCH


# --- the trace -----------------------------------------------------------------------------------------------------


class _Trace(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(
        self, model: nn.Module, sample_shape: Shape, fixed_statistics: bool, drop: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model, self.fixed_statistics, self.drop, self.dtype = model, fixed_statistics, drop, dtype
        self.names = {id(value): name for name, value in model.named_parameters()}
        self.owned = {id(value) for value in model.buffers()}
        self.shapes: list[Shape] = [sample_shape]
        self.steps: list[Op | Refusal] = []
        self.blocker: Refusal | None = None
        self.training = model.training
        self.sites = 0
        self.values: dict[fx.Node, Any] = {}
        self.input = Value(0, sample_shape, Storage())
        self.untraced = False  # modules behave as they do outside of a trace
        self.thread = threading.get_ident()  # fx patches nn.Module for all of them
        self.generators_moved = False
        self.module: str | None = None  # path of the leaf module in hand

    def survey(self) -> Survey:
        if not spatial_or_flat(self.input.shape):
            self.refuse("input", f"the engine takes [N, F] or [N, C, H, W] (got {batched(self.input.shape)})")
        output = None
        with torch.inference_mode(False), torch.enable_grad(), _symbols_known(self.model):
            before, draws = Snapshot(self.model), DrawsWatch(lambda: not self.untraced)
            try:
                # A root of its own, so that the model's hooks and __call__ are met like those of any other module.
                with draws:
                    output = self.trace(nn.Sequential(self.model)).output_node().args[0]
            except _Stop:
                pass
            except Exception as error:
                self.refuse("forward", f"cannot be traced: {error}", frames=traceback.walk_tb(error.__traceback__))
            self.generators_moved = draws.moved
            self._check_effects(before, draws.drawn or draws.moved)
        graph = None if any(isinstance(step, Refusal) for step in self.steps) else self._finish(output)
        first = next((step for step in self.steps if isinstance(step, Refusal)), None)
        return Survey(tuple(self.steps), tuple(self.shapes), self.blocker or first, graph)

    def _finish(self, output: Any) -> Graph | None:
        result = self.values.get(output) if isinstance(output, fx.Node) else None
        if not isinstance(result, Value):
            self.refuse("output", "forward must return one tensor [N, ...] that it computes from its input")
            return None
        try:
            check_fresh(result)
        except Refused as reason:
            self.refuse("output", str(reason))
            return None
        final = result.id
        if len(result.shape) == 3:  # the engine may hold images in an order of its own
            final = self.emit("flatten", result, shape=(math.prod(result.shape),), path="output").id
        ops = [step for step in self.steps if isinstance(step, Op)]
        used = {final}.union(*(op.inputs for op in ops))
        for op in ops:
            if op.output not in used:
                self.refuse(op.kind, "its result is never used", path=op.path)
                return None
        return Graph(tuple(ops), tuple(self.shapes), final, result.shape)

    def _check_effects(self, before: Snapshot, draws: bool) -> None:
        change = before.change()
        if change is not None:
            before.restore()
            path, name = change
            self.refuse(type(self.model.get_submodule(path)).__name__, f"forward changes its {name}", path=path)
        if draws:
            self.refuse("forward", "draws random numbers outside dropout, which a list of ops cannot repeat")

    def refuse(
        self,
        name: str,
        reason: str,
        *,
        path: str | None = None,
        frames: Any = None,
        shape: Shape | None = None,
        params: tuple[str, ...] = (),
        first: bool = False,
    ) -> None:
        line, source = ("", "") if path is not None else self._place(frames)
        refusal = Refusal(name, line if path is None else path, source, reason, shape, params)
        self.steps.append(refusal)
        if first:
            self.blocker = refusal

    def _place(self, frames: Any = None) -> tuple[str, str]:
        """Path of the leaf module in hand, or file:line and text of the innermost line of the user's code."""
        if self.module is not None:
            return self.module, ""
        for frame, line in _innermost_first(frames):
            file = frame.f_code.co_filename
            if not file.startswith(_OWN):
                return f"{os.path.basename(file)}:{line}", linecache.getline(file, line).strip()
        return (_user_path(next(reversed(self.module_stack.values()))[0]), "") if self.module_stack else ("", "")

    # fx.Tracer's hooks

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        library = type(m).__module__.startswith(("torch.nn", "torch.ao.nn"))
        return _unfit(m) is not None or (library and type(m) is not nn.Sequential)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        return super().call_module(m, forward, args, kwargs) if self._tracing() else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self._tracing() else attr_val

    def _tracing(self) -> bool:
        return not self.untraced and threading.get_ident() == self.thread

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return SymbolicTensor(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("control flow", "Python branches on a value that is only known when the module runs", first=True)
        raise _Stop

    def iter(self, obj: fx.Proxy) -> Iterator:
        self.refuse("control flow", "Python iterates over a tensor, sample by sample", first=True)
        raise _Stop

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *more: Any, **options: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **options)
        self.untraced = True
        try:
            self.values[proxy.node] = self._value(kind, target, self.lift(args), self.lift(kwargs))
        finally:
            self.untraced = False
        return proxy

    # meaning of one traced call

    def shape_of(self, proxy: fx.Proxy) -> tuple:
        value = self.values[proxy.node]
        if isinstance(value, Value):
            return (self.create_proxy("call_function", _batch_size, (proxy,), {}), *value.shape)
        if isinstance(value, ParameterName):
            return value.shape
        if isinstance(value, Constant):
            return tuple(value.tensor.shape)
        if value is BATCH:
            raise AttributeError("the batch size has no shape")
        raise _Stop  # behind a refused call

    def example_of(self, proxy: fx.Proxy) -> Any:
        """An object of the type that the proxy stands for."""
        value = self.values[proxy.node]
        if value is BATCH:
            return 1
        if value is UNKNOWN:
            raise _Stop
        if isinstance(value, ParameterName):
            return self.model.get_parameter(value.name)
        return value if isinstance(value, tuple) else torch.empty(0)

    def lift(self, argument: Any) -> Any:
        """The argument with every tensor replaced by what is known of it."""
        if isinstance(argument, fx.Proxy):
            return self.values[argument.node]
        if isinstance(argument, Tensor):
            if id(argument) in self.names:
                return ParameterName(self.names[id(argument)], tuple(argument.shape))
            return Constant(argument, id(argument) in self.owned)
        if isinstance(argument, (tuple, list)):
            return tuple(self.lift(each) for each in argument)
        if isinstance(argument, dict):
            return {name: self.lift(each) for name, each in argument.items()}
        return argument

    def _value(self, kind: str, target: Any, args: tuple, kwargs: dict) -> Any:
        if kind == "placeholder":
            return self.input
        if kind == "get_attr":
            return self.lift(operator.attrgetter(target)(self.root))
        if target is _batch_size:
            return BATCH
        if target is operator.getitem and isinstance(args[0], tuple):
            return args[0][args[1]]
        if UNKNOWN in _leaves((args, kwargs)):
            return UNKNOWN
        module = operator.attrgetter(target)(self.root) if kind == "call_module" else None
        self.module = _user_path(target) if module is not None else None
        try:
            return self._lower_call(target, module, args, kwargs)
        except Refused as reason:
            result = self._run(kind, target, module, args, kwargs)
            named = [value.name for value in _leaves((args, kwargs)) if isinstance(value, ParameterName)]
            if module is not None:
                named += [self.names[id(value)] for value in module.parameters()]
            shape = next((value.shape for value in _leaves(result) if isinstance(value, Value)), None)
            self.refuse(_call_name(target, module, args), str(reason), shape=shape, params=tuple(named))
            return result
        finally:
            self.module = None

    def _lower_call(self, target: Any, module: nn.Module | None, args: tuple, kwargs: dict) -> Any:
        if module is not None:
            reason = _unfit(module)
            if reason:
                raise Refused(reason)
            if type(module) not in MODULES:
                raise Refused("not among the fused ops")
            target, attributes = MODULES[type(module)](module)
            kwargs = {**kwargs, **self.lift(attributes)}
        row = FUNCTIONS.get(target)
        if row is None:
            raise Refused("not among the fused ops")
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise Refused("runs under torch.no_grad(), which cuts its gradient")
        if True in _surroundings()[:2]:
            raise Refused("runs under torch.autocast, and the engine keeps the parameters' precision")
        try:
            bound = inspect.signature(row).bind(self, *args, **kwargs)
        except TypeError as error:
            raise Refused(f"called in a form that is not fused: {error}") from None
        if not isinstance(bound.arguments["input"], Value):
            raise Refused(f"applied to {describe(bound.arguments['input'])}")
        rank = RANKS.get(type(module))
        if rank and len(bound.arguments["input"].shape) != rank:
            raise Refused(f"fused only on {rank + 1} dimensions (got {batched(bound.arguments['input'].shape)})")
        for value in _leaves((args, kwargs)):
            if isinstance(value, Value):
                check_fresh(value)
        return row(*bound.args, **bound.kwargs)

    def _run(self, kind: str, target: Any, module: nn.Module | None, args: tuple, kwargs: dict) -> Any:
        """What a refused call returns, found by running it on tensors without data for 2 and for 3 samples."""

        def concrete(value: Any, batch: int) -> Any:
            if isinstance(value, Value):
                return torch.empty(batch, *value.shape, device="meta", dtype=self.dtype)
            if isinstance(value, ParameterName):
                return self.model.get_parameter(value.name).to("meta")
            if isinstance(value, Constant):
                return value.tensor.to("meta")
            if isinstance(value, tuple):
                return tuple(concrete(each, batch) for each in value)
            if isinstance(value, dict):
                return {name: concrete(each, batch) for name, each in value.items()}
            return batch if value is BATCH else value

        def result(batch: int) -> Any:
            inputs, named = concrete(args, batch), concrete(kwargs, batch)
            if module is not None:
                state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
                empty = {name: value.to("meta") for name, value in state.items()}
                return torch.func.functional_call(module, empty, inputs, named)
            if kind == "call_method":
                return getattr(inputs[0], target)(*inputs[1:], **named)
            return target(*inputs, **named)

        def merged(two: Any, three: Any) -> Any:
            if isinstance(two, (tuple, list)):
                return tuple(merged(a, b) for a, b in zip(two, three, strict=True))
            if not isinstance(two, Tensor) or (two.shape[:1], three.shape[:1]) != ((2,), (3,)):
                return UNKNOWN
            return self.tensor(tuple(two.shape[1:])) if two.shape[1:] == three.shape[1:] else UNKNOWN

        if module is not None and _unfit(module):
            return UNKNOWN
        try:
            with torch.no_grad():
                return merged(result(2), result(3))
        except Exception:
            return UNKNOWN  # not every op runs without data

    # what the rows of the table use

    def tensor(self, shape: Shape, storage: Storage | None = None) -> Value:
        self.shapes.append(shape)
        storage = storage or Storage()
        return Value(len(self.shapes) - 1, shape, storage, storage.version)

    def emit(
        self,
        kind: str,
        *inputs: Value,
        shape: Shape | None = None,
        params: tuple = (None, None),
        buffers: tuple[Tensor, ...] = (),
        inplace: bool = False,
        view: bool = False,
        path: str | None = None,
        **attributes: Any,
    ) -> Value:
        shape = inputs[0].shape if shape is None else shape
        for each in (*(value.shape for value in inputs), shape):
            if not spatial_or_flat(each):
                raise Refused(f"fused only on [N, F] and [N, C, H, W] (got {batched(each)})")
        if inplace and inputs[0].storage is self.input.storage:
            raise Refused("changes the module's input in place")
        output = self.tensor(shape, inputs[0].storage if view else None)
        place = self._place()[0] if path is None else path
        values = tuple(value.id for value in inputs)
        self.steps.append(Op(kind, values, output.id, shape, params, buffers, attributes, place))
        if not inplace:
            return output
        target = inputs[0]
        target.storage.version += 1
        target.id, target.version = output.id, target.storage.version
        return target


# --- small helpers -------------------------------------------------------------------------------------------------

_OWN = (os.path.dirname(torch.__file__) + os.sep, __file__, op_table.__file__)


def _surroundings() -> tuple[bool, ...]:
    """What changes the meaning of a module from outside: autocast, hooks of all modules."""
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return *autocast, _global_hooks() is not None


def _innermost_first(frames: Any) -> Iterator[tuple[Any, int]]:
    if frames is not None:
        yield from reversed(list(frames))
        return
    for frame, line in traceback.walk_stack(None):
        if frame.f_code is _Trace.survey.__code__:
            return
        yield frame, line


def _user_path(path: str) -> str:
    return path.removeprefix("0").removeprefix(".")


def _unfit(module: nn.Module) -> str | None:
    """Why the module's class does not tell what a call of it computes."""
    if parametrize.is_parametrized(module):
        return "its parameters are computed by torch.nn.utils.parametrize"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "it has hooks, which the engine would skip" if any(hooks) else _global_hooks()


def _global_hooks() -> str | None:
    """Why hooks of all modules forbid fusing, if they do; torch has no public name that tells of them."""
    for kind in ("forward", "forward_pre", "backward", "backward_pre"):
        hooks = getattr(nn.modules.module, f"_global_{kind}_hooks", None)
        if hooks is None:
            return (
                f"torch {torch.__version__} does not tell whether all modules have hooks, which the engine would skip"
            )
        if hooks:
            return "it has hooks, which the engine would skip"
    return None


@contextlib.contextmanager
def _symbols_known(model: nn.Module) -> Iterator[None]:
    """In the user's files `len(x)` is the symbolic batch size and `isinstance(x, Tensor)` holds, as it will outside."""
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__ if issubclass(cls, nn.Module)}
    files = [vars(sys.modules[name]) for name in names if name in sys.modules and not name.startswith("torch.")]
    patches = [(file, name, new) for file in files for name, new in (("len", _length), ("isinstance", _is_instance))]
    patches = [patch for patch in patches if patch[1] not in patch[0]]
    original = torch.is_tensor
    for file, name, new in patches:
        file[name] = new
    torch.is_tensor = _is_tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.is_tensor = original
        for file, name, _ in patches:
            file.pop(name, None)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def _call_name(target: Any, module: nn.Module | None, args: tuple) -> str:
    if module is not None:
        return type(module).__name__
    if target is builtins.getattr:
        return f"Tensor.{args[1]}"
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
