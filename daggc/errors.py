"""The errors a user can meet. Every one derives from :class:`DaggcError`."""

from __future__ import annotations


class DaggcError(Exception):
    """Something daggc was asked to do cannot be done; the message says what, where and what to do."""


class IRError(DaggcError):
    """A program is malformed: it does not parse, or breaks a rule that the verifier holds."""


class TypeRuleError(IRError):
    """An op's inputs or attributes do not fit its type rule."""


class CaptureError(DaggcError):
    """A model cannot be captured, or cannot be captured faithfully."""


class DataDependentError(CaptureError):
    """A model's control flow or shapes depend on the numbers in a tensor."""


class DifferentiationError(DaggcError):
    """A gradient was asked for through something that has none, or whose rule is missing."""


class PlanError(DaggcError):
    """No plan fits the devices, or a user's override contradicts the program."""


class RunError(DaggcError):
    """A program, a call or a step failed while running."""


class BranchError(RunError):
    """The numbers that a model's Python decides on are not those that it was captured with."""


class WorkerLostError(RunError):
    """A worker that held state of a model is gone; training resumes from the last checkpoint."""


def located(message: str, path: str = "", source: str = "") -> str:
    """Append the user's module path and source line to a message, where they are known."""
    where = ", ".join(part for part in (path and f"in module {path!r}", source and f"at {source}") if part)
    return f"{message} ({where})" if where else message
