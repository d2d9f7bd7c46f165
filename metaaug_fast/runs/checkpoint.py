"""One file a checkpoint: tensors as safetensors, everything else as JSON in its header, a digest over every byte.

The state is any nesting of dicts, lists, tuples, numbers, strings, None and tensors, so a learner's, an optimizer's and
a scheduler's `state_dict()` go in as they are and come out equal, bit for bit. The header's entry `metaaug_fast` holds

    {"version": 3, "state": tree}

where the tree is the state with a tensor replaced by `{"$tensor": name}`, a tuple by `{"$tuple": [...]}` and a dict
whose keys are not all plain strings by `{"$pairs": [[key, value], ...]}`. Tensors are named by their path in the state
(`learner.0.weight`, and `learner.0.weight#2` where two have one path), so any reader of safetensors finds them. The
header's entry `sha256` is the digest of the file, with zeros in the digest's own place: it finds damage, not malice.

Version 2 told of runs in another way, with the same digest. Version 1 had no digest: such files are read, with a
warning, for damage in their tensors cannot be seen.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import previous_of, try_writing, write_atomically

VERSION = 3
_ENTRY, _DIGEST = "metaaug_fast", "sha256"
_BLANK = "0" * 64
_DIGEST_FIELD = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path`: at any moment, even through a kill, the file is the old checkpoint or the new one.

    A whole checkpoint that lies at `path` is kept as the one before, `files.previous_of(path)`.

    Raises:
        TypeError: the state holds something other than dicts, lists, tuples, numbers, strings, None and tensors.
        FileWriteError: the file cannot be written; the message names it.

    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "one.safetensors"
    >>> save(path, {"step": 3, "weights": {"bias": torch.ones(2)}})
    >>> load(path)
    {'step': 3, 'weights': {'bias': tensor([1., 1.])}}
    """
    # Damage that came later must not take the place of a whole file before.
    write_atomically(path, _serialised(state), keep=_is_whole(path))


def try_saving(path: str | Path, state: Mapping[str, Any], more: int = 0) -> None:
    """See whether `save` will succeed, and leave everything as it was.

    A run comes to need three files at a time: the checkpoint, the one before, and the one being written.

    Args:
        more: how many bytes later states may have more than this one.

    Raises:
        TypeError, FileWriteError: as `save`.
    """
    size = len(_serialised(state)) + more
    try_writing(path, size * (3 - sum(each.exists() for each in (Path(path), previous_of(path)))))


def load(path: str | Path) -> dict[str, Any]:
    """The state that `save` wrote, tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, of another kind, or of a newer version; where a whole one before it was
            kept, the message names that.
    """
    try:
        return _read(path)
    except (CheckpointError, FileNotFoundError) as error:
        hint = f"; the checkpoint before it is {previous_of(path)}" if _is_whole(previous_of(path)) else ""
        raise type(error)(f"{error}{hint}") from error.__cause__


def load_or_previous(path: str | Path) -> tuple[dict[str, Any], Path]:
    """The state at `path`, or that of the checkpoint before it, with a warning, where `path` is damaged; and its file.

    Raises:
        FileNotFoundError, CheckpointError: as `load`, where none of the two is whole.
    """
    try:
        return _read(path), Path(path)
    except _DamagedError as error:
        previous = previous_of(path)
        if not _is_whole(previous):
            raise CheckpointError(str(error)) from error.__cause__
        warnings.warn(f"{error}; going on from the checkpoint before it, {previous}", stacklevel=2)
        return _read(previous), previous


class _DamagedError(CheckpointError):
    """Not what was once written."""


def _read(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        kind = _DamagedError if error.errno == errno.EIO else CheckpointError
        raise kind(f"{path} cannot be read ({error.strerror})") from error
    try:
        version, tree = _header(data)
        if version <= VERSION:
            tensors = safetensors.torch.load(data)
            state = _unpack(tree, tensors)
            if not isinstance(state, dict):
                raise ValueError(f"its state is a {type(state).__name__}")
    except MemoryError:
        raise
    except Exception as error:  # Damage can raise anything.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _DamagedError(f"{path} is damaged or no checkpoint of metaaug_fast ({reason})") from error
    if version > VERSION:
        raise CheckpointError(f"{path} has checkpoint version {version}; this metaaug_fast reads up to {VERSION}")
    if version == 1:
        warnings.warn(f"{path} has checkpoint version 1, without a digest: damage in it cannot be seen", stacklevel=3)
    return state


def _is_whole(path: str | Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _read(path)
    except (FileNotFoundError, CheckpointError):
        return False
    return True


def _serialised(state: Mapping[str, Any]) -> bytearray:
    tensors: dict[str, Tensor] = {}
    header = json.dumps({"version": VERSION, "state": _pack(dict(state), "", tensors)})
    try:
        data = bytearray(safetensors.torch.save(tensors, metadata={_ENTRY: header, _DIGEST: _BLANK}))
    except KeyError as error:
        raise TypeError(f"checkpoint must hold tensors that safetensors knows (got {error})") from None
    place = _digest_place(data)
    assert place is not None
    data[place] = _digest(data, place).encode()
    return data


def _header(data: bytes) -> tuple[int, Any]:
    """The version and the tree, once the digest is found to be right."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise ValueError("it is truncated")
    place = _digest_place(data)
    if place is not None and _digest(data, place) != data[place].decode():
        raise ValueError("its digest does not match")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if _ENTRY not in metadata:
        raise ValueError("it lacks the entry metaaug_fast")
    content = json.loads(metadata[_ENTRY])
    version = content["version"]
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"its version is {version!r}")
    if 1 < version <= VERSION and place is None:
        raise ValueError("its digest is missing")
    return version, content["state"]


def _digest_place(data: bytes | bytearray) -> slice | None:
    """Where in the header the digest stands."""
    found = _DIGEST_FIELD.search(data, 8, 8 + int.from_bytes(data[:8], "little"))
    return slice(*found.span(1)) if found else None


def _digest(data: bytes | bytearray, place: slice) -> str:
    view = memoryview(data)
    digest = hashlib.sha256(view[: place.start])
    digest.update(_BLANK.encode())
    digest.update(view[place.stop :])
    return digest.hexdigest()


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise TypeError(f"checkpoint must hold dense tensors with values (got another at {path!r})")
        label = path.encode(errors="replace").decode()
        name, others = label, 1
        while name in tensors or name == "__metadata__":
            others += 1
            name = f"{label}#{others}"
        # A clone of its own: safetensors refuses tensors that share memory. It writes bytes, so nothing may be lazy.
        tensors[name] = value.detach().cpu().resolve_conj().resolve_neg().contiguous().clone()
        return {"$tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        items = [(key, _pack(item, _join(path, key), tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$pairs": [[_pack_key(key, path), item] for key, item in items]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, _join(path, index), tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    raise TypeError(f"checkpoint must hold numbers, strings and tensors (got {type(value).__name__} at {path!r})")


def _pack_key(key: Any, path: str) -> Any:
    if isinstance(key, tuple):
        return {"$tuple": [_pack_key(item, path) for item in key]}
    if key is None or isinstance(key, (bool, int, float, str)):
        return key
    raise TypeError(f"checkpoint must have numbers, strings and tuples as keys (got {type(key).__name__} at {path!r})")


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
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in tree["$pairs"]}
    return {key: _unpack(item, tensors) for key, item in tree.items()}


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
