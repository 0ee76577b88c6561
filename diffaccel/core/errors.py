"""Errors that end in one sentence and a documented exit code.

Exit codes: 0 ok, 1 internal error, 2 usage or configuration, 3 bad input data, 4 missing weights or offline,
5 numerical failure, 130 / 143 interrupted by Ctrl-C / SIGTERM after a checkpoint.
"""

import difflib
from collections.abc import Iterable


class DiffaccelError(Exception):
    """Base of every error that a user can cause or repair; its text says what to do next.

    Attributes:
        exit_code: of the command that ends with it.
        told_elsewhere: another process of the job says the same, so this one need not.
    """

    exit_code = 1
    told_elsewhere = False


class UsageError(DiffaccelError, ValueError):
    """A wrong option, configuration value or call."""

    exit_code = 2


class GuidanceError(UsageError):
    """A pipeline, scheduler or call that a guidance rule cannot act on exactly."""


class DataError(DiffaccelError, ValueError):
    """Input files that are missing, empty, damaged or of the wrong kind."""

    exit_code = 3


class MissingWeightsError(DiffaccelError):
    """Weights that are not on this machine and are not fetched silently."""

    exit_code = 4


class NumericalError(DiffaccelError):
    """A non-finite value where training or evaluation must stop."""

    exit_code = 5


class InterruptedRun(DiffaccelError):
    """A run stopped by a signal after its state was saved; exit code is 128 + signal number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def error_of(exit_code: int, text: str) -> DiffaccelError:
    """The error with an exit code, for one that happened in another process."""
    kinds = {kind.exit_code: kind for kind in (UsageError, DataError, MissingWeightsError, NumericalError)}
    return kinds.get(exit_code, DiffaccelError)(text)


def unknown(kind: str, name: str, valid: Iterable[str]) -> UsageError:
    """Return the error for a name that is not registered: nearest valid name first, whatever its case, then all."""
    valid = sorted(valid)
    folded = {item.casefold(): item for item in valid}
    close = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.5)
    hint = f" Did you mean {folded[close[0]]!r}?" if close else ""
    return UsageError(f"Unknown {kind} {name!r}.{hint} Valid: {', '.join(valid)}.")
