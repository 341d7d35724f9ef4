"""What can go wrong with a checkpoint, in three kinds that a run treats differently."""

from __future__ import annotations


class BadCheckpoint(ValueError):
    """Bytes on disk are missing or not the ones that were saved. The run falls back to an older checkpoint.

    `file` is the file's path, `tensor` the key whose bytes failed (None where no single tensor is meant).
    """

    def __init__(self, message: str, *, file: str, tensor: str | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.tensor = tensor


class CheckpointMismatch(ValueError):
    """A sound checkpoint that is not of this model: missing or unknown keys, other shapes or dtypes.

    Falling back would not help, so this always stops the run; `problems` lists every difference found.
    """

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(message)
        self.problems = problems


class CheckpointFailed(RuntimeError):
    """A save or load could not be carried out (disk full, read-only, a rank lost); names rank, file and cause."""
