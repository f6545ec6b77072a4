"""The bridge: a process beside the trainer that follows an event log and sends the events to one tracker.

    python -m starling.tracking.bridge RUN_DIR/events.jsonl --tracker mlflow --parent PID:START

Each tracker has its own process, so that a tracker that hangs does not delay the others. A bridge may hang, die, or be
killed and restarted: the cursor records how far it came, and the tracker stores an event that is sent twice only once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from starling.core.errors import StarlingError
from starling.core.files.refusals import refusal
from starling.core.files.safe_open import name_top, runs_root
from starling.tracking.delivery import Bridge, bridge_lock
from starling.tracking.events import last_event
from starling.tracking.lock import exclusive
from starling.tracking.process_identity import ProcessIdentity
from starling.tracking.system import SystemSampler
from starling.tracking.tracker import TrackerUnavailableError
from starling.tracking.trackers import TRACKERS

POLL_S = 0.5
BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
LAST_ATTEMPTS = 3
"""Number of attempts after the trainer has ended; `starling track sync` sends the rest."""
LAST_ATTEMPTS_S = 5.0
"""Seconds after the end of the trainer after which no further attempt begins."""


def follow(
    bridge: Bridge,
    *,
    trainer_is_gone: Callable[[], bool] = lambda: False,
    opened_at: int = 0,
    stop: threading.Event | None = None,
    sample: Callable[[], Mapping[str, float] | None] = lambda: None,
    poll_s: float = POLL_S,
    backoff_s: tuple[float, ...] = BACKOFF_S,
) -> int:
    """Deliver events as they come until the log ends, or its trainer is gone; return the exit status.

    0: everything is delivered. 1: the rest is kept for `sync`. A tracker that does not work is tried again with growing
    pauses while the trainer lives, then `LAST_ATTEMPTS` times. `stop` ends the delivery after the current event. A
    `log_end` before byte `opened_at` is of an earlier session. Each turn asks `sample` for a sample of the machine.
    """
    stop = stop or threading.Event()
    failures = last_failures = 0
    done_since: float | None = None

    def closed() -> bool:
        return _log_is_closed(bridge.log, opened_at)

    def done() -> bool:
        return closed() or trainer_is_gone()

    def take_sample() -> None:
        values = sample()
        if values:
            bridge.add_sample(values, time=time.time())

    while not stop.is_set():
        was_done = done()
        if was_done and done_since is None:
            done_since = time.monotonic()
        take_sample()
        try:
            bridge.deliver(stop.is_set)
            ended = was_done and done()
            if ended:
                bridge.finish(time=time.time(), gone=not closed())
            bridge.hold_up("")
        except (TrackerUnavailableError, OSError) as error:
            failures += 1
            if failures == 1:
                print(f"{bridge.log}: {error}; kept, and tried again", file=sys.stderr, flush=True)
            _hold_up(bridge, str((isinstance(error, OSError) and refusal(error)) or error))
            if was_done and done_since is not None:
                last_failures += 1
                if last_failures >= LAST_ATTEMPTS or time.monotonic() - done_since > LAST_ATTEMPTS_S:
                    return 1
            pause = 1.0 if was_done else backoff_s[min(failures, len(backoff_s)) - 1]
            _pause(pause, stop, lambda: not was_done and done(), take_sample, poll_s)  # noqa: B023
            continue
        failures = 0
        if ended:
            return 0
        done_since, last_failures = None, 0
        stop.wait(poll_s)
    return 1 if bridge.pending else 0


def _hold_up(bridge: Bridge, problem: str) -> None:
    try:
        bridge.hold_up(problem)
    except OSError as error:
        print(f"{bridge.log}: cannot save the cursor: {error}", file=sys.stderr, flush=True)


def _pause(
    seconds: float,
    stop: threading.Event,
    wake: Callable[[], bool],
    each_turn: Callable[[], None],
    poll_s: float,
) -> None:
    """Wait for `seconds`, or until `stop` is set or `wake` returns True."""
    deadline = time.monotonic() + seconds
    while not stop.wait(min(poll_s, max(0.0, deadline - time.monotonic()))):
        each_turn()
        if time.monotonic() >= deadline or wake():
            return


def _log_is_closed(log: Path, opened_at: int) -> bool:
    """Return whether the log's last event is a `log_end` written after byte `opened_at`."""
    event = last_event(log)
    return event is not None and event.name == "log_end" and event.end > opened_at


def main(arguments: list[str] | None = None) -> int:
    """Run the bridge for one log; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m starling.tracking.bridge", description=__doc__)
    parser.add_argument("log", type=Path, help="the event log")
    parser.add_argument("--tracker", choices=TRACKERS, default="mlflow", help="where to [%(default)s]")
    parser.add_argument(
        "--parent", type=ProcessIdentity.parse, help="the trainer, as PID:START: its end is the log's"
    )
    parser.add_argument("--opened-at", type=int, default=0, help="the log's size when the trainer opened it")
    parser.add_argument("--top", type=Path, help="the folder below which no link is followed [the log's]")
    options = parser.parse_args(arguments)
    name_top(options.top or options.log.parent)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    # The trainer handles Ctrl-C in the terminal; the bridge continues until the log ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)
    trainer: ProcessIdentity | None = options.parent

    def trainer_is_gone() -> bool:
        return trainer is not None and not trainer.is_alive()

    sampler = SystemSampler(trainer)
    try:
        tracker = TRACKERS[options.tracker].open(runs_root(), os.environ)
        # An earlier bridge may still be sending the end of the run that is being resumed.
        with exclusive(bridge_lock(options.log, tracker.name), timeout_s=120):
            bridge = Bridge(options.log, tracker)
            status = follow(
                bridge,
                trainer_is_gone=trainer_is_gone,
                opened_at=options.opened_at,
                stop=stop,
                sample=sampler.sample,
            )
        tracker.close()
    except (StarlingError, TimeoutError) as error:
        print(f"{options.log}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return status


if __name__ == "__main__":
    sys.exit(main())
