"""What scripts/demo says while it waits, and at its end."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "demo_report.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    specification = importlib.util.spec_from_file_location("demo_report", SCRIPT)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules["demo_report"] = module  # dataclasses look their module up by name
    specification.loader.exec_module(module)
    return module


def replica(**changes: Any) -> dict[str, Any]:
    return {
        "replica": "demo-search-cpu0", "phase": "running", "exit_code": None, "state": "running", "finished": 2,
        "best_fitness": 0.25, "epoch": 3, "epochs": 4, "candidate": "5", "trainer_phase": "training",
    } | changes  # fmt: skip


def test_trainings_under_way_count_towards_the_time_left(report: ModuleType) -> None:
    progress = report.Progress([replica(), replica(epoch=None, epochs=None, trainer_phase="starting")])

    assert progress.work_done == 2.5
    assert report.time_left_s(progress.work_done, 5, 50.0) == 50.0
    assert "2/5 trainings done, best fitness 0.2500" in progress.line(50.0, 5)


def test_time_left_is_unknown_before_any_work(report: ModuleType) -> None:
    assert report.time_left_s(0, 6, 30.0) is None


def test_replica_that_ended_badly_is_named_and_no_longer_live(report: ModuleType) -> None:
    progress = report.Progress([replica(phase="exited", exit_code=3, state="exited 3: data error")])

    assert not progress.live
    assert progress.failed == ["demo-search-cpu0: exited 3: data error"]


def test_summary_compares_the_best_row_with_the_seeds(report: ModuleType, tmp_path: Path) -> None:
    columns = "metrics/precision,metrics/recall,metrics/mAP_0.5,metrics/mAP_0.5:0.95,a,b,c,lr0,momentum\n"
    rows = "0,0,0.1,0.1,1,1,1,0.01,0.9\n0,0,0.3,0.2,1,1,1,0.02,0.9\n0,0,0.2,0.1,1,1,1,0.03,0.9\n"
    (tmp_path / "evolve.csv").write_text(columns + rows)

    text = report.summarise(tmp_path)

    assert "fitness before (seed) 0.10000, after (best) 0.21000: +0.11000" in text
    assert "* lr0              0.02         seed 0.01" in text
    assert "  momentum" in text
    assert "* momentum" not in text
