"""One file a checkpoint: tensors as safetensors, everything else as JSON in its header.

The state is any nesting of dicts, lists, tuples, numbers, strings, None and tensors, so a learner's, an optimizer's and
a scheduler's `state_dict()` go in as they are and come out equal, bit for bit. The header's entry `metaaug_fast` holds

    {"version": 1, "state": tree}

where the tree is the state with a tensor replaced by `{"$tensor": name}`, a tuple by `{"$tuple": [...]}` and a dict
whose keys are not all plain strings by `{"$pairs": [[key, value], ...]}`. Tensors are named by their path in the state
(`learner.0.weight`), so any reader of safetensors finds them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .errors import CheckpointError

VERSION = 1
_ENTRY = "metaaug_fast"


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path`: at any moment, even through a kill, the file is the old checkpoint or the new one.

    Raises:
        TypeError: the state holds something other than dicts, lists, tuples, numbers, strings, None and tensors.

    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "one.safetensors"
    >>> save(path, {"step": 3, "weights": {"bias": torch.ones(2)}})
    >>> load(path)
    {'step': 3, 'weights': {'bias': tensor([1., 1.])}}
    """
    tensors: dict[str, Tensor] = {}
    header = {"version": VERSION, "state": _pack(dict(state), "", tensors)}
    write_atomically(path, safetensors.torch.save(tensors, metadata={_ENTRY: json.dumps(header)}))


def load(path: str | Path) -> dict[str, Any]:
    """The state that `save` wrote, tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, of another kind, or of a newer version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_ENTRY)
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no checkpoint ({str(error).split(': ')[-1]})") from None
    if header is None:
        raise CheckpointError(f"{path} holds tensors, but is no checkpoint of metaaug_fast")
    content = json.loads(header)
    if content["version"] > VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {content['version']}; this metaaug_fast reads up to {VERSION}"
        )
    return _unpack(content["state"], tensors)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace the file at `path` by `data`, complete and on the disk, or leave it as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a report for people and programs, atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def _sync_folder(folder: Path) -> None:
    """Make a rename last; folders cannot be opened on every system."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # A clone of its own: safetensors refuses tensors that share memory.
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"$tensor": path}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        packed = [(key, _pack(item, _join(path, key), tensors)) for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key, _ in packed)
        return dict(packed) if plain else {"$pairs": [list(pair) for pair in packed]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, _join(path, index), tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    raise TypeError(f"checkpoint must hold numbers, strings and tensors (got {type(value).__name__} at {path!r})")


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(_unpack(item, tensors) for item in tree["$tuple"])
    if "$pairs" in tree:
        return {key: _unpack(item, tensors) for key, item in tree["$pairs"]}
    return {key: _unpack(item, tensors) for key, item in tree.items()}


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
