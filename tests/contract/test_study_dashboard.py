"""optuna-dashboard on a study of ours: it shows what is there, and looking harms nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from starling.search.outcome import State
from starling.search.study import LeasedCandidate, SearchStudy
from tests.searches import outcome, spec
from tests.unit.search.test_worker import SEED

START = "from optuna_dashboard._cli import main; main()"


def open_study(directory: Path) -> SearchStudy:
    return SearchStudy.open_or_create(directory, spec(SEED, 9))


def claim_of(study: SearchStudy) -> LeasedCandidate:
    claim = study.ask("w")
    assert isinstance(claim, LeasedCandidate)
    return claim


class Dashboard:
    """A dashboard process on loopback."""

    def __init__(self, journal: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(journal), "--host", "127.0.0.1", "--port", str(port), "--quiet",
             "--server", "wsgiref"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, path: str, method: str = "GET", body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read() or b"null")

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self.ask("/api/studies")
                return
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)


@pytest.fixture
def study(tmp_path: Path) -> SearchStudy:
    """Return a study with one finished candidate, one that failed, and one that is being trained."""
    study = open_study(tmp_path)
    study.finish(claim_of(study), outcome(0.25))
    study.fail(claim_of(study), State.FAILED, "out of memory")
    claim_of(study)
    return study


@pytest.fixture
def dashboard(study: SearchStudy) -> Iterator[Dashboard]:
    """Return a dashboard that answers."""
    dashboard = Dashboard(study.directory / "study.journal")
    try:
        dashboard.wait()
        yield dashboard
    finally:
        dashboard.process.kill()
        dashboard.process.wait()


def test_the_dashboard_shows_a_study_live_and_looking_writes_nothing(
    study: SearchStudy, dashboard: Dashboard
) -> None:
    before = (study.directory / "study.journal").read_bytes()
    (listed,) = dashboard.ask("/api/studies")["study_summaries"]
    assert listed["study_name"] == "search"
    assert (study.directory / "study.journal").read_bytes() == before
    study.finish(claim_of(study), outcome(0.75))  # workers go on while somebody looks
    trials = dashboard.ask(f"/api/studies/{listed['study_id']}")["trials"]
    assert [trial["state"] for trial in trials] == ["Complete", "Fail", "Running", "Complete"]
    assert [trials[number]["values"] for number in (0, 3)] == [[0.25], [0.75]]
    own = {"study.journal", "study.lock"}
    assert {path.name for path in study.directory.iterdir() if path.is_file()} == own


def test_a_note_left_in_the_dashboard_between_two_records_leaves_the_study_whole(
    study: SearchStudy, dashboard: Dashboard
) -> None:
    (listed,) = dashboard.ask("/api/studies")["study_summaries"]
    note = {"body": "remember this", "version": 1}
    dashboard.ask(f"/api/studies/{listed['study_id']}/note", "PUT", note)
    assert b"remember this" in (study.directory / "study.journal").read_bytes()
    assert not (study.directory / "study.journal.lock").exists()
    study.finish(claim_of(study), outcome(0.75))
    assert [candidate.fitness for candidate in SearchStudy.read(study.directory).finished()] == [0.25, 0.75]
    assert study.progress().finished == 2
