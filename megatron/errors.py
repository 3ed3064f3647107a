"""The errors that end a run, and the exit code that each of them means.

An error of this family is the user's to read: the entry points print its message, without a
traceback, and leave with its exit code. Everything else is a bug and keeps its traceback.
"""


def printable(text: str) -> str:
    """``text`` as a terminal may be given it: what it would obey, or cannot show, as escapes.

    Messages quote what was read, and that may be anything.
    """
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1]
        for letter in text
    )


class RunError(Exception):
    """What ends a run for a reason that has a name.

    Attributes:
        on_every_rank: all ranks raise this same error, so that one of them may speak for all.
    """

    exit_code = 1

    def __init__(self, message: str, *, on_every_rank: bool = False) -> None:
        super().__init__(printable(message))
        self.on_every_rank = on_every_rank


class ConfigError(RunError, ValueError):
    """A configuration that the user has to mend."""

    exit_code = 2


class DataError(RunError):
    """Training data or a tokenizer that cannot be used."""

    exit_code = 3


class CheckpointError(RunError):
    """A checkpoint that is missing, damaged, or of another model."""

    exit_code = 4


class DiskError(RunError):
    """A file that could not be written, as on a full disk."""

    exit_code = 5


class NonFiniteError(RunError):
    """A loss, gradient, weight or moment that is infinite or not a number."""

    exit_code = 6


class ReplicaError(RunError):
    """Ranks that must hold the same hold something else."""

    exit_code = 7


class PeerError(RunError):
    """Another rank was lost, or did not answer in time."""

    exit_code = 8


class LatePeerError(PeerError):
    """Another rank did not answer in time; it has not left, as far as anybody knows."""


class StoppedOnRequestError(RunError):
    """The run was asked to stop, and has saved its state."""

    exit_code = 10
