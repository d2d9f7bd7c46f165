"""Where tests keep what they compile from the native sources."""

import hashlib
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "tests" / "native"


def folder_of(kind: str, *what: object) -> Path:
    """A folder for one kind of build, of these sources and `what` else it depends on; those of others are removed."""
    digest = hashlib.sha256(repr(what).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), *NATIVE.glob("*.cpp"), *NATIVE.glob("*.h")]):
        digest.update(path.read_bytes())
    group = ROOT / "build" / "native" / kind
    folder = group / digest.hexdigest()[:16]
    if not folder.exists():
        shutil.rmtree(group, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder
