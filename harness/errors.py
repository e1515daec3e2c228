"""Everything that harness raises on purpose.

    HarnessError                 1
    ├── ConfigError              2   the YAML or the command line is wrong
    ├── StoreError              74   the filesystem refuses, right now
    ├── CheckpointError         65   what lies in the run's URL
    │   ├── Corrupt             65   bytes differ from what the manifest says
    │   ├── UnknownFormat       65   written by another version of the format
    │   ├── Mismatch             2   intact, but not a checkpoint of this model or this data
    │   ├── Unsupported          2   the state holds a value that a checkpoint cannot
    │   └── NoCheckpoint        66   the run has checkpoints, and none of them is whole
    ├── RankFailure             76   another rank failed, or the ranks disagree
    ├── CrashLoop               70   the same error at the same step, again and again
    ├── NonFinite               70   a loss or a gradient that is not finite, and the policy does not skip it
    ├── Superseded              77   a newer attempt trains this run
    └── Stopped                 75   asked to stop; everything is saved; start it again

The class says who must act. The message says where, what was expected and what was found. The number is the exit code of the
process. Numbers above 63 have the meanings of BSD's ``sysexits.h`` (DATAERR, NOINPUT, SOFTWARE, IOERR, TEMPFAIL, PROTOCOL,
NOPERM). Success is 0. Code 1 is an error in the training code, or a bug in harness, and comes with a traceback.
"""

from typing import ClassVar

from harness.secrecy import without_secrets


class HarnessError(Exception):
    """The base of all errors that harness raises on purpose. The process ends with its ``exit_code``.

    The message may repeat what a library said, without its secrets.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, *message: object) -> None:
        super().__init__(*(without_secrets(part) if isinstance(part, str) else part for part in message))


class ConfigError(HarnessError):
    """The configuration or the command line is wrong. Edit it and restart."""

    exit_code = 2


class StoreError(HarnessError):
    """A storage operation failed.

    ``transient`` is true if the same call may succeed later (a timeout, a refused connection). It is false if somebody must
    act first (permissions, a full disk, a missing bucket).
    """

    exit_code = 74

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class CheckpointError(HarnessError):
    """Something is wrong with the objects in the run's URL."""

    exit_code = 65


class Corrupt(CheckpointError):
    """An object is missing, cut, too long or altered. This checkpoint is never loaded."""


class UnknownFormat(CheckpointError):
    """The checkpoint has a version of the format that this program cannot read."""


class Mismatch(CheckpointError):
    """The checkpoint is whole, but does not belong to this model, optimizer or data."""

    exit_code = 2


class Unsupported(CheckpointError):
    """The state holds a value that cannot be written without pickle. The message has its path."""

    exit_code = 2


class NoCheckpoint(CheckpointError):
    """The run has checkpoints, but none is whole. harness does not train from scratch over them."""

    exit_code = 66


class RankFailure(HarnessError):
    """Another rank failed, or the ranks disagree."""

    exit_code = 76


class CrashLoop(HarnessError):
    """The run failed at the same step with the same error too often, also from an older checkpoint."""

    exit_code = 70


class NonFinite(HarnessError):
    """The loss or the gradients of a step are not finite, and ``nonfinite.policy`` does not skip it."""

    exit_code = 70


class Superseded(HarnessError):
    """A newer attempt trains this run: this one was believed dead, or the run was started twice."""

    exit_code = 77


class Stopped(HarnessError):
    """The run was asked to stop, and its last step is saved. Start it again."""

    exit_code = 75
