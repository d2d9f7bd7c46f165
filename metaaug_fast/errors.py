"""What can go wrong, by name."""


class FallbackWarning(UserWarning):
    """A module runs outside the fused engine; said once for each module and reason."""


class NotFusedError(RuntimeError):
    """`backend="fused"` was asked for and the module, loss or device cannot be fused."""


class NonFiniteError(FloatingPointError):
    """NaN or infinity arose while a task was adapted; the message names the task and the step."""


class CheckpointError(ValueError):
    """A file is not a whole checkpoint of this package, or does not fit what is to be resumed; the message names it."""


class FileWriteError(OSError):
    """A file cannot be written, or another run writes it; the message names it."""
