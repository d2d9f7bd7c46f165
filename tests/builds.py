"""Where tests keep what they compile from the native sources."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "tests" / "native"


@contextmanager
def folder_of(kind: str, *what: object) -> Iterator[Path]:
    """A folder for one kind of build, of these sources and `what` else it depends on; those of others are removed.

    One process at a time has it.
    """
    digest = hashlib.sha256(repr(what).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), *NATIVE.glob("*.cpp"), *NATIVE.glob("*.h")]):
        digest.update(path.read_bytes())
    group = ROOT / "build" / "native" / kind
    folder = group / digest.hexdigest()[:16]
    group.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(group.with_name(f"{kind}.lock")):
        if not folder.exists():
            shutil.rmtree(group, ignore_errors=True)
            folder.mkdir(parents=True)
        (folder / "lock").unlink(missing_ok=True)  # torch's own, which a killed build leaves for the next to wait for
        yield folder
