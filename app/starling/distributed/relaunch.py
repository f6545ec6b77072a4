"""`--device 0,1` without torchrun: start one process per device through torch's launcher, and return its exit code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from starling.core import package
from starling.core.errors import StarlingError, UsageError
from starling.device import OWN_LAUNCH
from starling.errors import TOLD

LOOPBACK = "127.0.0.1"
STOP_S = 600
"""Maximum seconds for stopped processes to save. The grace period of the stopping program usually ends sooner."""


class RanksKilled(StarlingError):
    """All processes of the group were killed, so that none of them could report it."""

    def __init__(self, signals: Mapping[int, int]) -> None:
        names = ", ".join(f"rank {rank} by {signal.Signals(signum).name}" for rank, signum in signals.items())
        super().__init__(
            f"killed: {names}. The last checkpoint is whole: look for what killed the process (out of memory?), "
            "then --resume"
        )


def relaunch(arguments: Sequence[str], processes: int) -> int:
    """Run `starling train` with these arguments in `processes` processes on this host, and return the exit code.

    A signal is passed on to the processes. `$MASTER_PORT` fixes the port at which they meet, otherwise any free port is
    used; raises UsageError if that port is taken, and RanksKilled if no process is left to report which one was killed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    given = os.environ.get("MASTER_PORT") or "0"
    if not given.isdecimal() or int(given) > 65535:
        raise UsageError(
            f"MASTER_PORT={given}: not a port; set it to a free one, or unset it and one is chosen"
        )
    port = int(given)
    _check_free(port)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes report better
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ[OWN_LAUNCH] = "1"
    os.environ["PYTHONPATH"] = package.python_path()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:{port}",
        local_addr=LOOPBACK,
        max_restarts=0,
        shutdown_timeout=STOP_S,
    )
    with tempfile.TemporaryDirectory(prefix="starling-") as folder:
        told = Path(folder) / "told"
        os.environ[TOLD] = str(told)
        try:
            program, *words = package.command("train", *arguments)
            elastic_launch(config, program)("-u", *words)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
            if not told.exists() and all(code < 0 for code in codes.values()):
                raise RanksKilled({rank: -code for rank, code in codes.items()}) from None
            return next((code for code in codes.values() if code > 0), 1)
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise UsageError(
                f"MASTER_PORT={port}: the port is taken by another program; set it to a free one, or unset it and "
                "one is chosen"
            ) from None
