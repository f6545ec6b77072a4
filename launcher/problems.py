"""Find everything that is wrong before saying so: independent checks, one refusal."""

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
"""Of several problems the one that is named first here gives the exit code: the user's file says more than a flag."""


class SeveralProblems(StarlingError):
    """More than one independent problem, each with its own remedy."""

    def __init__(self, problems: Sequence[StarlingError]) -> None:
        lines = [f"{number}. {_indented(str(problem))}" for number, problem in enumerate(problems, start=1)]
        super().__init__("\n  ".join([f"{len(problems)} problems; nothing was started", *lines]))
        self.problems = tuple(problems)
        self.exit_code = exit_code_of(problems)


class Problems:
    """Collects refusals of checks that do not depend on each other."""

    def __init__(self) -> None:
        self.found: list[StarlingError] = []

    def check(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return what `act` returns; None, with its refusal kept, when it raises a StarlingError.

        A path that the caller may not even look at is a refusal too.
        """
        try:
            return act(*args, **kwargs)
        except SeveralProblems as several:
            self._keep(several.problems)
        except StarlingError as error:
            self._keep([error])
        except PermissionError as error:
            self._keep(
                [UsageError(f"{error.filename}: you may not look at it; ask its owner, or name another path")]
            )
        return None

    def add(self, problem: StarlingError | None) -> None:
        """Keep a refusal; None is none."""
        if problem is not None:
            self._keep([problem])

    def _keep(self, problems: Sequence[StarlingError]) -> None:
        """Keep each in the order found; what two checks say in the same words is one problem."""
        said = {str(problem) for problem in self.found}
        self.found += {str(problem): problem for problem in problems if str(problem) not in said}.values()

    def raise_any(self) -> None:
        """Raise what was found: the one problem itself, or all of them together."""
        raise_all(self.found)

    def refuse(self) -> NoReturn:
        """Raise what was found, of which there is something."""
        raise _together(self.found)


def raise_all(problems: Sequence[StarlingError]) -> None:
    """Raise the one problem itself, or all of them together; nothing for none."""
    if problems:
        raise _together(problems)


def _together(problems: Sequence[StarlingError]) -> StarlingError:
    return problems[0] if len(problems) == 1 else SeveralProblems(problems)


def exit_code_of(problems: Sequence[StarlingError]) -> int:
    """Return the exit code of the most telling problem; 0 for none."""
    codes = {problem.exit_code for problem in problems}
    return next((code for code in MOST_SPECIFIC if code in codes), min(codes, default=0))


def _indented(text: str) -> str:
    return text.replace("\n", "\n     ")
