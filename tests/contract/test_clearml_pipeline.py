"""The example pipeline, over a double of ClearML's server: the real server cannot be had here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from starling.cli import export, train
from tests.conftest import REPOSITORY, TINY_LAYOUT
from tests.doubles.clearml_server import ClearmlServerDouble

EXAMPLE = REPOSITORY / "examples" / "clearml_pipeline.py"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("clearml_alone")]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the example, whose commands run in this process: they are the same, and torch is loaded already."""
    spec = importlib.util.spec_from_file_location("clearml_pipeline", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mains = {"train": train.main, "export": export.main}

    def run(words: list[str]) -> None:
        assert words[:2] == ["-m", "starling"]
        assert mains[words[2]](words[3:]) == 0

    monkeypatch.setattr(module, "run", run)
    return module


def test_each_step_works_with_what_the_one_before_hands_on(
    example: ModuleType, clearml_server: ClearmlServerDouble, tiny_data: Path, runs: Path
) -> None:
    flags = [
        "--weights",
        "",
        "--cfg",
        str(TINY_LAYOUT),
        "--img",
        "64",
        "--batch",
        "4",
        "--device",
        "cpu",
        "--epochs",
        "1",
    ]
    dataset = example.make_dataset(str(tiny_data.parent), "blood", "cells")
    hyp = example.search(dataset, "blood", 1, flags)
    folder = example.train(dataset, "blood", hyp, flags)
    assert Path(example.export(folder, ["--img", "64"])).stat().st_size > 1000
    assert f"data: clearml://{dataset}" in (Path(folder) / "opt.yaml").read_text()
    kinds = sorted(
        (task["name"], task["type"], task["status"]) for task in clearml_server.records.tasks.values()
    )
    assert kinds == [
        ("candidate 0", "training", "completed"),
        ("cells", "data_processing", "completed"),
        ("search", "optimizer", "completed"),
        ("train", "training", "completed"),
    ]
    [trained] = [task for task in clearml_server.records.tasks.values() if task["name"] == "train"]
    assert clearml_server.records.arguments(trained, "Datasets") == {dataset: dataset}


@pytest.mark.skipif(
    os.environ.get("STARLING_CLEARML_PIPELINE") != "1",
    reason="about a minute of an idle machine; STARLING_CLEARML_PIPELINE=1 runs it",
)
def test_the_whole_pipeline_runs_under_clearmls_own_controller(
    clearml_server: ClearmlServerDouble, tiny_data: Path, runs: Path, tmp_path: Path
) -> None:
    words = ["--folder", str(tiny_data.parent), "--weights", "", "--cfg", str(TINY_LAYOUT), "--img", "64", "--batch", "4",
             "--device", "cpu", "--trials", "1", "--search-epochs", "1", "--epochs", "1"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(list(runs.rglob("best.onnx"))) == 1
    [controller] = [task for task in clearml_server.records.tasks.values() if task["type"] == "controller"]
    steps = [task for task in clearml_server.records.tasks.values() if task["parent"] == controller["id"]]
    assert sorted(task["name"] for task in steps) == ["dataset", "export", "search", "train"]
    assert {task["status"] for task in [controller, *steps]} == {"completed"}
