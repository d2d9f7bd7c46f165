"""Files that are whole or not there, the file before, and one run at a time for one output.

A file is written beside its place, under a name of its own, and then renamed. Its writer holds a lock on it that the
kernel releases when the process ends, however it ends: a `.part` that nobody holds was left over, and is removed by
the next who writes into the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .errors import FileWriteError

_PART = re.compile(r"\..+\.[0-9a-f]{16}\.part", re.DOTALL)
_MARK = ".metaaug_fast"
"""A file in a folder that may be replaced."""
_HELD = threading.local()


def write_atomically(path: str | Path, data: bytes | bytearray, *, keep: bool = False) -> None:
    """Replace the file at `path` by `data`, complete and on the disk, or leave it as it was.

    Through a symbolic link its target is replaced. keep: what lies at `path` becomes `previous_of(path)`.

    Raises:
        FileWriteError: it cannot be written; the message names `path`.
    """
    with writing(path, keep=keep) as file, naming(path):
        file.write(data)


@contextlib.contextmanager
def writing(path: str | Path, *, keep: bool = False) -> Iterator[BinaryIO]:
    """A file to be written in the block, of which the same holds; an error in the block leaves all as it was.

    Raises:
        FileWriteError: it cannot be made or put in its place; the block itself writes under `naming(path)`.
    """
    target = target_of(path)
    with contextlib.ExitStack() as stack:
        with naming(path):
            stack.enter_context(_made_folder(target.parent))
            file, part = stack.enter_context(_part(target))
        yield file
        with naming(path):
            file.flush()
            os.fsync(file.fileno())
            if keep:
                _keep(target)
            os.replace(part, target)
            _sync_folder(target.parent)


@contextlib.contextmanager
def writing_folder(path: str | Path) -> Iterator[Path]:
    """A folder to be filled in the block: afterwards it is at `path`, complete, or all is as it was.

    A folder at `path` that was written in this way, as a hidden file in it says, is replaced; no other one is.

    Raises:
        FileWriteError: it cannot be made or put in its place; the block itself writes under `naming(path)`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "letters"
    >>> with writing_folder(path) as folder:
    ...     _ = (folder / "a").write_bytes(b"whole")
    >>> [file.name for file in path.parent.iterdir()], (path / "a").read_bytes()
    (['letters'], b'whole')
    """
    target = target_of(path)
    with contextlib.ExitStack() as stack:
        with naming(path):
            part = stack.enter_context(_part_folder(target))
        yield part
        with naming(path):
            for folder, _, names in os.walk(part):
                for name in names:
                    _sync(os.path.join(folder, name))
                _sync_folder(folder)
            _put(part, target)
            _sync_folder(target.parent)


def try_writing_folder(path: str | Path) -> None:
    """See whether `writing_folder` can begin, and leave everything as it was.

    Raises:
        FileWriteError: it cannot; the message names `path`.
    """
    with naming(path), _part_folder(target_of(path)):
        pass


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a report for people and programs, atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def try_writing(path: str | Path, size: int = 1) -> None:
    """See whether a file of `size` bytes can be written to `path`, and leave everything as it was.

    Raises:
        FileWriteError: it cannot; the message names `path`.
    """
    target = target_of(path)
    with naming(path), _made_folder(target.parent), _part(target) as (file, _):
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            file.write(bytes(size))


@contextlib.contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """`path` is this thread's to write until the block ends; tried first. Inside such a block it may be claimed again.

    Raises:
        FileWriteError: another run holds it, or it cannot be written; the message names `path`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "out" / "run.safetensors"
    >>> with claimed(path):
    ...     write_atomically(path, b"whole")
    >>> [file.name for file in path.parent.iterdir()]
    ['run.safetensors']
    """
    held: set[str] = _HELD.__dict__.setdefault("paths", set())
    target = target_of(path)
    name = os.path.realpath(target)
    if name in held:
        yield
        return
    with contextlib.ExitStack() as stack:
        with naming(path):
            stack.enter_context(_made_folder(target.parent))
            try_writing(path)
            stack.callback(_lock(path, target.with_name(f".{target.name}.lock")))
        held.add(name)
        stack.callback(held.remove, name)
        yield


def target_of(path: str | Path) -> Path:
    """Where `path` leads: the file itself, or what a symbolic link points to."""
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def previous_of(path: str | Path) -> Path:
    """Where the file before is kept.

    >>> previous_of("runs/maml.safetensors").name
    'maml.previous.safetensors'
    """
    target = target_of(path)
    return target.with_name(f"{target.stem}.previous{target.suffix}")


def best_of(path: str | Path) -> Path:
    """Where the best of a run is kept.

    >>> best_of("runs/maml.safetensors").name
    'maml.best.safetensors'
    """
    target = target_of(path)
    return target.with_name(f"{target.stem}.best{target.suffix}")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An error of the system becomes a FileWriteError about the path that the caller gave."""
    try:
        yield
    except FileWriteError:
        raise
    except OSError as error:
        raise FileWriteError(f"{path} cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
    """The folder, with those above it; those that were made are removed again if nothing came into them."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is no folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            for each in missing:
                each.rmdir()


@contextlib.contextmanager
def _part(target: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside `target`, held as long as it is written, and gone at the end unless it was renamed."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is no regular file")
    if target.is_symlink():
        raise OSError(errno.ELOOP, "it is a link to itself")
    _sweep(target.parent)
    while True:
        part = _part_name(target)
        with open(part, "xb") as file:
            try:
                with contextlib.suppress(OSError):  # Some file systems have no locks.
                    fcntl.flock(file, fcntl.LOCK_EX)
                # Another's sweep may have come between making it and holding it.
                if os.fstat(file.fileno()).st_nlink == 0:
                    continue
                yield file, part
                return
            finally:
                part.unlink(missing_ok=True)


@contextlib.contextmanager
def _part_folder(target: Path) -> Iterator[Path]:
    """The same, of a folder; it has the mark of one that may be replaced."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise NotADirectoryError(errno.ENOTDIR, "it is no folder")
    if target.is_dir() and any(target.iterdir()) and not (target / _MARK).is_file():
        raise FileExistsError(errno.EEXIST, "a folder of something else lies there")
    with _made_folder(target.parent):
        _sweep(target.parent)
        while True:
            part = _part_name(target)
            part.mkdir()
            try:
                with _opened(part) as descriptor:
                    with contextlib.suppress(OSError):
                        fcntl.flock(descriptor, fcntl.LOCK_EX)
                    try:
                        (part / _MARK).touch()
                    except FileNotFoundError:  # swept, as above
                        continue
                    yield part
                    return
            finally:
                shutil.rmtree(part, ignore_errors=True)


def _put(part: Path, target: Path) -> None:
    """A folder in the place of the one before, which is then removed."""
    before = _part_name(target)
    try:
        os.rename(target, before)
    except FileNotFoundError:
        os.rename(part, target)
        return
    try:
        os.rename(part, target)
    except OSError:
        os.rename(before, target)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _part_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")


def _sweep(folder: Path) -> None:
    """Remove what killed writers left."""
    with os.scandir(folder) as entries:
        left = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries if _PART.fullmatch(entry.name)]
    for path, is_folder in left:
        # Gone, held or another's: not ours to remove.
        with contextlib.suppress(OSError), _opened(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (shutil.rmtree if is_folder else os.unlink)(path)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    """The descriptor of a file or folder, to read."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _keep(target: Path) -> None:
    """What lies at `target` is also the file before; at no moment is one of the two missing."""
    while target.exists():
        link = _part_name(target)
        try:
            try:
                os.link(target, link)
            except FileNotFoundError:
                raise
            except OSError:  # No hard links here.
                shutil.copyfile(target, link)
            os.replace(link, previous_of(target))
            return
        except FileNotFoundError:
            continue  # Nobody holds a link, so another's sweep may have removed it.
        finally:
            # Renaming one name of a file to another of its names leaves both.
            link.unlink(missing_ok=True)


def _lock(path: str | Path, lock: Path) -> Callable[[], None]:
    """Hold the file `lock`, or say that another does; a call that lets go of it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise FileWriteError(
                f"{path} is being written by another run; wait for it, or write to another file"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{path} cannot be locked here ({error.strerror}): no two runs may write it at a time", stacklevel=5
            )
        # The run before may have removed it between opening and holding it.
        if os.fstat(descriptor).st_nlink > 0:
            break
        os.close(descriptor)

    def let_go() -> None:
        lock.unlink(missing_ok=True)
        os.close(descriptor)

    return let_go


def _sync(path: str | Path) -> None:
    with _opened(path) as descriptor:
        os.fsync(descriptor)


def _sync_folder(folder: str | Path) -> None:
    """Make a rename last; folders cannot be opened on every system."""
    with contextlib.suppress(OSError):
        _sync(folder)
