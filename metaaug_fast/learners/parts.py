"""Parts of a user's network: which layer is its head, and the same network with other modules in some places."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping

import torch
from torch import fx, nn

from ..engine.exclusive import ONE_AT_A_TIME
from ..engine.problem import parameters_of


def find_head(model: nn.Module, head: str | None = None) -> str:
    """The path of a model's head: the last linear layer on the way to its output, or the module that is named.

    Args:
        head: a path in the model. None: to be found.

    Raises:
        TypeError: `model` is no module, or `head` no name.
        ValueError: there is no module of that name with parameters of its own, or no head can be found.

    >>> find_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.LogSoftmax(-1)))
    '2'
    """
    names = parameters_of(model)
    found = _last_linear(model) if head is None else head
    if not isinstance(found, str):
        raise TypeError(f"head must be the name of a layer (got {head!r})")
    with_parameters = [
        path for path, module in model.named_modules() if path and next(module.parameters(), None) is not None
    ]
    if found and found not in with_parameters:
        raise ValueError(
            f"head must name a layer with parameters (got {head!r}; there are {', '.join(with_parameters)})"
        )
    own = {f"{found}.{name}" if found else name for name, _ in model.get_submodule(found).named_parameters()}
    if not own <= names.keys():
        shared = sorted(own - names.keys())[0]
        raise ValueError(
            f"head must have parameters of its own (got {found!r}, of which {shared!r} is another layer's, too)"
        )
    return found


def inside(path: str) -> str:
    """The pattern of the names of a module's parameters, as `adapt` takes it.

    >>> inside("head"), inside("")
    ('head.*', '*')
    """
    return f"{path}.*" if path else "*"


def outside(model: nn.Module, path: str) -> tuple[str, ...]:
    """The names of the parameters that require a gradient and are not in the module at `path`."""
    parameters = parameters_of(model).items()
    return tuple(
        name for name, value in parameters if value.requires_grad and not fnmatch.fnmatchcase(name, inside(path))
    )


def replaced(model: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """The model with other modules at some paths. All else, parameters and buffers, is shared with it.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    >>> body = replaced(model, {"1": nn.Identity()})
    >>> body[0] is model[0], len(model), body(torch.zeros(1, 2)).shape
    (True, 2, torch.Size([1, 3]))
    """
    if "" in parts:
        return parts[""]
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    for child in {path.partition(".")[0] for path in parts}:
        below = {path.partition(".")[2]: part for path, part in parts.items() if path.partition(".")[0] == child}
        twin._modules[child] = replaced(model.get_submodule(child), below)
    return twin


class _LinearLeaves(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) or super().is_leaf_module(module, path)


def _last_linear(model: nn.Module) -> str:
    """The path of the linear layer behind which a traced model has no other parameters."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    known = f"the linear layers are {', '.join(linear)}" if linear else "there is no linear layer"
    called = type(model).__name__
    with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        try:
            # A copy, for `forward` may change its module, inside of another, for the model may itself be a layer.
            graph = _LinearLeaves().trace(nn.Sequential(copy.deepcopy(model)))
        except Exception as error:  # the user's forward may do what no trace can follow
            if len(linear) == 1:
                return linear[0]
            raise ValueError(f"head must be named, for {called} cannot be traced (got None; {known})") from error
    used = _ancestors(graph.output_node())
    layers = {path for path, module in model.named_modules() if next(module.parameters(), None) is not None}
    for node in reversed(list(graph.nodes)):
        path = str(node.target).removeprefix("0").removeprefix(".")
        if node in used and node.op == "call_module" and path in linear:
            return path
        if node in used and (node.op == "get_attr" or (node.op == "call_module" and path in layers)):
            raise ValueError(f"head must be named, for {called} ends in {path or 'itself'} (got None; {known})")
    raise ValueError(f"head must be named, for {called} uses no layer (got None; {known})")


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """All that a node depends on, and the node."""
    seen, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - seen
        seen |= new
        waiting += new
    return seen
