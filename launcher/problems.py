"""Collect the problems of independent checks, and raise them as one error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, ParamSpec, TypeVar

from launcher.errors import EngineError
from starling.core.errors import CheckpointError, DataError, DiskFull, StarlingError, UsageError

P = ParamSpec("P")
T = TypeVar("T")

MOST_SPECIFIC = tuple(
    kind.exit_code for kind in (DataError, CheckpointError, DiskFull, EngineError, UsageError)
)
"""The exit code of several problems is the first of these: an error in the user's file says more than one in a flag."""


class SeveralProblems(StarlingError):
    """More than one independent problem, each with its own remedy."""

    def __init__(self, problems: Sequence[StarlingError]) -> None:
        lines = [f"{number}. {_indented(str(problem))}" for number, problem in enumerate(problems, start=1)]
        super().__init__("\n  ".join([f"{len(problems)} problems; nothing was started", *lines]))
        self.problems = tuple(problems)
        self.exit_code = exit_code_of(problems)


class Problems:
    """Collects the errors of independent checks."""

    def __init__(self) -> None:
        self.found: list[StarlingError] = []

    def check(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return the value of `act`; if it raises a StarlingError, keep the error and return None.

        A PermissionError becomes a UsageError, and is kept too.
        """
        try:
            return act(*args, **kwargs)
        except SeveralProblems as several:
            self._keep(several.problems)
        except StarlingError as error:
            self._keep([error])
        except PermissionError as error:
            self._keep(
                [UsageError(f"{error.filename}: you may not access it; ask its owner, or name another path")]
            )
        return None

    def add(self, problem: StarlingError | None) -> None:
        """Keep an error; None means no error."""
        if problem is not None:
            self._keep([problem])

    def _keep(self, problems: Sequence[StarlingError]) -> None:
        """Keep the problems in the order found; two with the same message count once."""
        said = {str(problem) for problem in self.found}
        self.found += {str(problem): problem for problem in problems if str(problem) not in said}.values()

    def raise_any(self) -> None:
        """Raise the problems found: a single one itself, several as SeveralProblems; return if there are none."""
        raise_all(self.found)

    def refuse(self) -> NoReturn:
        """Raise the problems found, at least one."""
        raise _together(self.found)


def raise_all(problems: Sequence[StarlingError]) -> None:
    """Raise a single problem itself, several as SeveralProblems; return if there are none."""
    if problems:
        raise _together(problems)


def _together(problems: Sequence[StarlingError]) -> StarlingError:
    return problems[0] if len(problems) == 1 else SeveralProblems(problems)


def exit_code_of(problems: Sequence[StarlingError]) -> int:
    """Return the exit code of the first problem in the order of MOST_SPECIFIC; 0 without problems."""
    codes = {problem.exit_code for problem in problems}
    return next((code for code in MOST_SPECIFIC if code in codes), min(codes, default=0))


def _indented(text: str) -> str:
    return text.replace("\n", "\n     ")
