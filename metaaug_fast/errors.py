"""What can go wrong, by name."""

import torch


class FallbackWarning(UserWarning):
    """A module runs outside the fused engine; said once for each module and reason."""


class ConvergenceWarning(UserWarning):
    """Equations were not solved to the accuracy asked for; said once for each learner and reason."""


class NotFusedError(RuntimeError):
    """`backend="fused"` was asked for and the module, loss or device cannot be fused."""


class NonFiniteError(FloatingPointError):
    """NaN or infinity arose while a task was adapted; the message names the task and the step."""


class CheckpointError(ValueError):
    """A file is not a whole checkpoint of this package, or does not fit what is to be resumed; the message names it."""


class FileWriteError(OSError):
    """A file cannot be written, or another run writes it; the message names it."""


class ContractError(ValueError):
    """A learner breaks the contract; the message names the clause."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was asked for that cannot be had; torch and numpy have many words for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, ValueError)) and any(words in str(error) for words in _TOO_LARGE)


_TOO_LARGE = (
    "DefaultCPUAllocator",
    "Storage size calculation overflowed",
    "numel: integer multiplication overflow",
    "Maximum allowed size exceeded",
    "Maximum allowed dimension exceeded",
    "array is too big",
)


def in_one_line(error: BaseException, name: bool = False) -> str:
    """What an error of somebody else's code says, without C++ frames; with its class if `name` or if it is silent.

    >>> in_one_line(KeyError("a"), name=True), in_one_line(MemoryError())
    ("KeyError: 'a'", 'MemoryError')
    """
    text = " ".join(str(error).partition("Exception raised from")[0].split())
    return ": ".join(filter(None, (type(error).__name__, text))) if name or not text else text
