"""Arrays that take seconds to make are kept on disk, under a name that changes with what they were made from."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from ..files import write_atomically

Arrays = Mapping[str, np.ndarray]


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where caches lie: `cache_dir`, else `$METAAUG_CACHE`, else `metaaug_fast` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("METAAUG_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "metaaug_fast"


def cached_arrays(
    name: str, made_from: Iterable[object], make: Callable[[], Arrays], cache_dir: str | os.PathLike[str] | None = None
) -> Arrays:
    """The arrays that `make` returns, read from the cache where it has them.

    Args:
        name: how the file's name begins.
        made_from: everything the arrays depend on, as values with a faithful `repr`; its digest is in the file's name.
        make: called if there is no file, or (with a warning) if the file is damaged.

    A cache that cannot be written is a warning, not an error. Files are put in place by renaming, so that a reader
    never sees half of one.
    """
    digest = hashlib.sha256("\n".join(map(repr, made_from)).encode()).hexdigest()
    path = cache_folder(cache_dir) / f"{name}-{digest[:20]}.npz"
    if path.exists():
        try:
            # The archive checks a checksum of every array.
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored)
        except Exception as error:  # Damage can raise anything, and the remedy is always the same.
            warnings.warn(f"{path} is damaged and is made again ({error})", stacklevel=3)
    arrays = make()
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        warnings.warn(f"{error}; the next start is as slow as this one", stacklevel=3)
    return arrays


def file_digest(path: Path) -> str:
    """SHA-256 of a file; of a module's own `__file__`, it makes every change of the code a new key."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
