"""Arrays that take seconds to make are kept on disk, under a name that changes with what they were made from."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_dir
from torch import Tensor

from ..errors import FileWriteError
from ..files import write_atomically
from .mapped import Mapped, Rows, rows_in

Arrays = Mapping[str, np.ndarray]


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with `~` and `~user` replaced; of a user without a home folder, as it is."""
    return Path(os.path.expanduser(path))


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where caches lie: `cache_dir`, else `$METAAUG_CACHE`, else where the system keeps the user's caches.

    The last is `metaaug_fast` in `$XDG_CACHE_HOME` or `~/.cache`, on macOS in `~/Library/Caches`: see platformdirs.

    Raises:
        OSError: the user has no home folder (no `$HOME` and no entry in the password file), and nothing else is set.
    """
    if given := cache_dir or os.environ.get("METAAUG_CACHE"):
        return expanded(given)
    with suppress(RuntimeError):  # there is no home; platformdirs before 4.12 leaves the `~`
        folder = expanded(user_cache_dir("metaaug_fast"))
        if folder.parts[0] != "~":
            return folder
    raise OSError("there is no home folder to keep a cache in: set METAAUG_CACHE to a folder, or HOME")


def cached_arrays(
    name: str,
    made_from: Iterable[object],
    make: Callable[[], Arrays],
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    names: Iterable[str] = (),
) -> Arrays:
    """The arrays that `make` returns, read from the cache where it has them.

    Args:
        name: how the file's name begins.
        made_from: everything the arrays depend on, as values with a faithful `repr`; its digest is in the file's name.
        make: called if there is no file, or (with a warning) if the file is damaged.
        names: arrays without which a file is damaged.

    A cache that cannot be written, or has no place, is a warning, not an error. Files are put in place by renaming, so
    that a reader never sees half of one.
    """
    path = _place(name, made_from, cache_dir)
    if path is None:
        return make()
    found = _stored(path, names)
    if found is not None:
        return found
    arrays = make()
    try:
        _store(path, arrays)
    except OSError as error:
        _warn(f"{error}; the next start is as slow as this one")
    return arrays


def cached_samples(
    name: str,
    made_from: Iterable[object],
    make: Callable[[Rows], Arrays],
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    names: Iterable[str] = (),
) -> tuple[Tensor | Path, Arrays]:
    """As `cached_arrays`, for samples that may be larger than memory: `make` appends them, one by one, to `Rows`.

    Returns:
        The samples `[N, ...]`, or the file that holds them, for `Mapped`; and the arrays that `make` returned.
    """
    path = _place(name, made_from, cache_dir)
    if path is not None:
        samples = path.with_suffix(".npy")
        found = _stored(path, names) if samples.exists() else None
        if found is not None:
            try:
                Mapped(samples)
                return samples, found
            except ValueError as error:
                _warn(f"{error}; it is made again")
        try:
            with rows_in(samples) as rows:
                arrays = make(rows)
            _store(path, arrays)  # the last: where it is, the samples are
            return samples, arrays
        except FileWriteError as error:
            _warn(f"{error}; samples are held in memory, and the next start is as slow as this one")
    rows = Rows()
    arrays = make(rows)
    return torch.from_numpy(rows.stacked()), arrays


def _place(name: str, made_from: Iterable[object], cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """The file of what was made from this, whether it is there or not; None, with a warning, if there is no cache."""
    digest = hashlib.sha256("\n".join(map(repr, made_from)).encode()).hexdigest()
    try:
        return cache_folder(cache_dir) / f"{name}-{digest[:20]}.npz"
    except OSError as error:
        _warn(f"{name} is made again at every start ({error})")
        return None


def _stored(path: Path, names: Iterable[str]) -> Arrays | None:
    """The arrays in a file; None if there is none, or (with a warning) if it is damaged."""
    if not path.exists():
        return None
    try:
        # The archive checks a checksum of every array.
        with np.load(path, allow_pickle=False) as stored:
            if missing := [each for each in names if each not in stored]:
                raise ValueError(f"it has no {', '.join(missing)}")
            return dict(stored)
    except Exception as error:  # Damage can raise anything, and the remedy is always the same.
        _warn(f"{path} is damaged and is made again ({error})")
        return None


def _store(path: Path, arrays: Arrays) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_atomically(path, content.getvalue())


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def file_digest(path: Path) -> str:
    """SHA-256 of a file; of a module's own `__file__`, it makes every change of the code a new key."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
