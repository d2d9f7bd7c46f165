"""Samples in a file: written one by one, and read by mapping the file, so that memory need not hold them."""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..files import naming, writing

_HEADER = 256  # bytes: enough for any shape, and a multiple of what NumPy aligns by


class Rows:
    """Arrays of one shape and dtype, kept one after the other in memory; `rows_in` keeps them in a file.

    >>> rows = Rows()
    >>> rows.append(np.zeros(3))
    >>> rows.append(np.ones(3))
    >>> len(rows), rows.stacked().shape
    (2, (2, 3))
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.first: np.ndarray | None = None
        self._count = 0
        self._kept: list[np.ndarray] = []

    def __len__(self) -> int:
        return self._count

    def append(self, row: np.ndarray) -> None:
        """ValueError where it has another shape or dtype than those before."""
        if self.first is None:
            self.first = row
        if (row.shape, row.dtype) != (self.first.shape, self.first.dtype):
            raise ValueError(
                f"samples must have one shape and dtype (got {self.first.shape} {self.first.dtype} at 0 and "
                f"{row.shape} {row.dtype} at {self._count})"
            )
        self._keep(row)
        self._count += 1

    def stacked(self) -> np.ndarray:
        """All rows, `[N, ...]`."""
        return np.stack(self._kept)

    def _keep(self, row: np.ndarray) -> None:
        self._kept.append(row)


class _RowsInFile(Rows):
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        super().__init__()

    def clear(self) -> None:
        super().clear()
        self._file.seek(_HEADER)
        self._file.truncate()

    def _keep(self, row: np.ndarray) -> None:
        with naming(self._path):
            self._file.write(row.tobytes())

    def finish(self) -> None:
        """Write what NumPy wants to find at the beginning."""
        first = np.zeros(0) if self.first is None else self.first
        about = repr({"descr": first.dtype.str, "fortran_order": False, "shape": (len(self), *first.shape)})
        start = b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little")
        with naming(self._path):
            self._file.seek(0)
            self._file.write(start + about.encode().ljust(_HEADER - 11) + b"\n")


@contextlib.contextmanager
def rows_in(path: str | os.PathLike[str]) -> Iterator[Rows]:
    """Rows in a file of NumPy's format `.npy`, which is in its place at the end of the block; or not at all.

    Raises:
        FileWriteError: it cannot be written.
    """
    with writing(Path(path)) as file:
        rows = _RowsInFile(Path(path), file)
        yield rows
        rows.finish()


class Mapped:
    """The array in a file of NumPy's format, read where it is looked at.

    Attributes:
        tensor: `[N, ...]`, which must not be written to.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is none or not whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"samples must be a tensor, or a file of NumPy's .npy format (there is none at {path})"
            )
        try:
            self._array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(self._array, np.memmap):
                raise ValueError("it holds several")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                self.tensor: Tensor = torch.from_numpy(self._array)
        except (ValueError, TypeError, OSError, EOFError) as error:
            raise ValueError(f"{path} is no whole array in NumPy's .npy format ({error})") from error
        self._advise("MADV_RANDOM")  # or the system reads far more of the file around every sample

    def expect(self, places: np.ndarray) -> None:
        """Let the system read these samples meanwhile, all at once, for they are wanted soon."""
        size = self._array.strides[0]
        first = self._array.offset % mmap.ALLOCATIONGRANULARITY  # in the mapping, which begins at a page
        for begin in (first + size * np.unique(places)).tolist():
            page = begin - begin % mmap.PAGESIZE
            self._advise("MADV_WILLNEED", page, begin + size - page)

    def _advise(self, how: str, *extent: int) -> None:
        file = getattr(self._array, "_mmap", None)
        if isinstance(file, mmap.mmap) and hasattr(mmap, how):
            file.madvise(getattr(mmap, how), *extent)
