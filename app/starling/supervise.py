"""Run a trainer, and restart it after a crash: the main process of every replica.

    supervise.py [--max-restarts N] -- COMMAND…

Docker's restart policies cannot distinguish a crash from a user's mistake, and only a crash is worth a restart. A
trainer resumes its last checkpoint by itself, so a restart uses the same command. Signals are passed to the trainer;
the exit code is the trainer's last. Standard library only; the supervisor sleeps while the trainer works.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from starling.core.budget import BudgetExceeded
from starling.core.cgroups import own_oom_kills
from starling.core.files.folder import Folder
from starling.core.files.regular import read_regular
from starling.core.handover import strip_set_ids
from starling.core.worker_status import RestartRecord
from starling.outputs.run_dir import runs_root

STOPS = (signal.SIGTERM, signal.SIGINT)
PASSED_ON = (*STOPS, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
WATCHED = frozenset({*PASSED_ON, signal.SIGCHLD})

KILLED = 128 + signal.SIGKILL
MISTAKES = {
    2: "the command line",
    3: "the data",
    4: "the checkpoint",
    6: "the full disk",
    126: "the command",
    127: "the command",
}
"""Exit codes that a restart would repeat -> what the user must correct."""

STRIP_S = 5.0
"""The time limit for finding set-id bits at a replica's end; a stop leaves a minute for everything."""

PR_SET_PDEATHSIG = 1
KILLS_FILE = "STARLING_OOM_KILLS"


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartPolicy:
    """The rules for restarting a trainer that has ended."""

    max_restarts: int = 3
    """The most restarts in all; 0: never."""
    delay_s: float = 4.0
    """The wait before the first restart; it doubles before each later one."""
    longest_delay_s: float = 300.0
    early_s: float = 5.0
    """A trainer that fails sooner has not started to train, and a restart would not help; `up` may still watch it."""

    def delay(self, restart: int) -> float:
        """Return the seconds to wait before restart number `restart`, from 1."""
        return float(min(self.delay_s * 2 ** (restart - 1), self.longest_delay_s))

    def refusal(self, end: End, restarts: int) -> str | None:
        """Return why a trainer with this end is not restarted; empty after a regular end, None for a restart."""
        if end.code == 0 or end.stopped or end.code in (128 + number for number in STOPS):
            return ""
        if end.oom_killed:
            return "out of memory, and a restart would be too: give it more --memory, or lower --batch or --workers"
        if end.lasting:
            return "not started again: it reported that it would fail again"
        if end.code in MISTAKES:
            return f"not started again, which would not correct {MISTAKES[end.code]}"
        if restarts == 0 and end.lasted_s < self.early_s:
            return f"not started again, because it failed within {self.early_s:g} s"
        if restarts >= self.max_restarts:
            return (
                f"given up after {restarts} restarts" if restarts else "not started again (--max-restarts 0)"
            )
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """The end of one attempt of the trainer."""

    code: int
    """The exit code as in a shell: 128 + N for signal N."""
    lasted_s: float
    oom_killed: bool = False
    """Whether the kernel has killed a process of this replica for memory during the attempt."""
    stopped: bool = False
    """Whether the trainer was asked to stop."""
    lasting: bool = False
    """Whether the trainer reported that a restart would fail again: a GPU out of memory, a loss of NaN twice."""


class Supervisor:
    """Starts the command, waits for its end, and restarts it as the policy says."""

    def __init__(
        self, command: Sequence[str], policy: RestartPolicy, record: RestartRecord | None = None
    ) -> None:
        self._command, self._policy, self._record = list(command), policy, record
        self._stop: int | None = None
        """The signal that requested a stop."""

    def run(self) -> int:
        """Return the exit code of the last attempt: 137 if the kernel killed it for memory."""
        signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
        if self._record is not None:
            self._record.begin()
        restarts = 0
        while True:
            end = self._attempt()
            refusal = self._policy.refusal(end, restarts)
            if refusal is not None:
                if refusal:
                    say(f"the trainer {words_for(end.code)}: {refusal}")
                self._tell(restarts, end)
                return end.code
            restarts += 1
            delay = self._policy.delay(restarts)
            say(
                f"the trainer {words_for(end.code)}; starting it again in {delay:g} s "
                f"({restarts} of {self._policy.max_restarts})"
            )
            self._tell(restarts, end, delay)
            if not self._wait(delay):
                assert self._stop is not None
                return 128 + self._stop
            self._tell(restarts, end)

    def _attempt(self) -> End:
        began, kills = time.monotonic(), oom_kills()
        code = self._await_end(start(self._command))
        return End(
            code=code,
            lasted_s=time.monotonic() - began,
            oom_killed=oom_kills() > kills,
            stopped=self._stop is not None,
            lasting=self._record is not None and self._record.failure_lasts(),
        )

    def _await_end(self, child: int) -> int:
        """Pass signals to the child until it has ended, and return its exit code. Orphans are reaped too."""
        while True:
            number = signal.sigwaitinfo(WATCHED).si_signo
            if number != signal.SIGCHLD:
                self._note(number)
                os.kill(child, number)
                continue
            for pid, code in ended_children():
                if pid == child:
                    return code

    def _wait(self, seconds: float) -> bool:
        """Sleep; return False if a stop was requested meanwhile, else True."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            came = signal.sigtimedwait(WATCHED, left)
            if came is None:
                break
            if came.si_signo == signal.SIGCHLD:
                list(ended_children())
            self._note(came.si_signo)
            if self._stop is not None:
                return False
        return True

    def _note(self, number: int) -> None:
        if number in STOPS:
            self._stop = number

    def _tell(self, restarts: int, end: End, delay: float | None = None) -> None:
        if self._record is not None:
            self._record.tell(restarts, exit_code=end.code, oom_killed=end.oom_killed, delay_s=delay)


def start(command: Sequence[str]) -> int:
    """Start the command with default signal handling and return its process id. It dies with this process."""
    prctl: Callable[[int, int], int] = ctypes.CDLL(None).prctl
    child = os.fork()
    if child:
        return child
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and exec would keep that
            signal.signal(ignored, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        os.execvp(command[0], list(command))
    except OSError as error:
        say(f"{command[0]}: {error.strerror}")
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)
    finally:
        os._exit(1)  # after any failure, the child must not continue as a second supervisor


def ended_children() -> list[tuple[int, int]]:
    """Reap every child that has ended; return process ids and exit codes."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not pid:
            return ended
        code = os.waitstatus_to_exitcode(status)
        ended.append((pid, 128 - code if code < 0 else code))


def oom_kills(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this replica's processes killed for memory: by the kernel, or as the engine reports."""
    return own_oom_kills() + told_kills(environment)


def told_kills(environment: Mapping[str, str]) -> int:
    """Return the number in the file that `$STARLING_OOM_KILLS` names.

    An engine that limits memory by watching, because no control group can be made, counts there before it kills.
    """
    try:
        return int(read_regular(environment[KILLS_FILE], 64))
    except (KeyError, OSError, ValueError, BudgetExceeded):
        return 0


def words_for(code: int) -> str:
    """Return `ended with exit code 1`, or `was killed by SIGSEGV`."""
    try:
        return f"was killed by {signal.Signals(code - 128).name}"
    except ValueError:
        return f"ended with exit code {code}"


def say(line: str) -> None:
    """Print one line to stderr, between the trainer's lines."""
    os.write(2, f"supervisor: {line}\n".encode())


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Parse, supervise, and return the exit code."""
    policy = RestartPolicy()
    parser = argparse.ArgumentParser("supervise.py", description="Run a trainer, and again when it crashes.")
    parser.add_argument("--max-restarts", type=int, default=policy.max_restarts, metavar="N", help="0: never")
    parser.add_argument(
        "--delay", type=float, default=policy.delay_s, metavar="SECONDS", help="before the first"
    )
    parser.add_argument("--early", type=float, default=policy.early_s, metavar="SECONDS",
                        help="no restart for a failure within this time")  # fmt: skip
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="what to run")
    given = parser.parse_args(argv)
    policy = RestartPolicy(max_restarts=given.max_restarts, delay_s=given.delay, early_s=given.early)
    replica = environment.get("STARLING_REPLICA")
    record = RestartRecord(runs_root(environment), replica, policy.max_restarts) if replica else None
    code = Supervisor(given.command, policy, record).run()
    if replica:
        strip(runs_root(environment))
    return code


def strip(runs: Path) -> None:
    """Remove set-id bits from this replica's files in the runs folder, which other users of the host can reach."""
    with contextlib.suppress(OSError), Folder.resolve(runs) as top:
        for line in strip_set_ids(top, STRIP_S).lines():
            say(f"{runs}: {line}")


if __name__ == "__main__":
    sys.exit(main())
