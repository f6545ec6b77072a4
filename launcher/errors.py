"""The errors of engines and replicas."""

from __future__ import annotations

from starling.core.errors import FULL, DiskFull, Exit, GpuLost, StarlingError


class EngineError(StarlingError):
    """An engine that does not answer, lacks something, or refuses."""

    exit_code = Exit.SERVICE


class NameTaken(EngineError):
    """A replica's name is held by something else."""


class ConnectionLost(EngineError):
    """The connection to another machine is gone, and does not come back by waiting."""


def disk_full(error: OSError) -> DiskFull | None:
    """Return what an error of a write means where the disk has no room for it; None for any other error."""
    if error.errno not in FULL:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return DiskFull(f"{where}cannot be written ({error.strerror}); free some space, and try again")


TRAINERS_OWN = frozenset({2, 3, 4, DiskFull.exit_code, GpuLost.exit_code})
"""Exit codes of a trainer that say what is wrong."""


class ReplicaFailed(StarlingError):
    """A replica ended with an error while `up` was watching it; carries the trainer's own exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        # Codes outside the documented ones (a signal, an import error) are the engine's affair: 5.
        self.exit_code = exit_code if exit_code in TRAINERS_OWN else EngineError.exit_code
