"""How a command may end other than well, for `main.py` to turn into text and exit codes.

FedsplitError
└── RunFailedError    the run failed inside Flower; carries the kind of the error there
KeyboardInterrupt
├── Terminated        SIGTERM or SIGHUP came
└── Interrupted       a run was stopped in good order; says what is left and how to go on
"""

from __future__ import annotations

from fedsplit.core.errors import FedsplitError


class RunFailedError(FedsplitError):
    """The run failed inside Flower; `kind` is the error's name there."""

    def __init__(self, message: str, *, kind: str = "FederationError") -> None:
        super().__init__(message)
        self.kind = kind


class Terminated(KeyboardInterrupt):
    """The process was asked to end by a signal other than Ctrl-C."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped on request; the message says what is left of it."""

    def __init__(self, message: str, *, terminated: bool) -> None:
        super().__init__(message)
        self.terminated = terminated
