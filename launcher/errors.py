"""The errors of engines and replicas."""

from __future__ import annotations

from starling.core.errors import FULL, DiskFull, Exit, GpuLost, StarlingError


class EngineError(StarlingError):
    """An engine does not answer, lacks something, or refuses."""

    exit_code = Exit.SERVICE


class NameTaken(EngineError):
    """Another container or process has the replica's name."""


class ConnectionLost(EngineError):
    """The connection to another machine is lost, and waiting does not restore it."""


def disk_full(error: OSError) -> DiskFull | None:
    """Return the DiskFull for a write that failed for lack of space; None for any other error."""
    if error.errno not in FULL:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return DiskFull(f"{where}cannot be written ({error.strerror}); free some space, and try again")


TRAINERS_OWN = frozenset({2, 3, 4, DiskFull.exit_code, GpuLost.exit_code})
"""Exit codes of a trainer that name the cause."""


class ReplicaFailed(StarlingError):
    """A replica ended with an error while `up` watched it; carries the trainer's exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        # Undocumented codes (a signal, an import error) become the engine's code, 5.
        self.exit_code = exit_code if exit_code in TRAINERS_OWN else EngineError.exit_code
