"""Trainings that ClearML's real agent runs, over a double of ClearML's server: the real server cannot be had here.

The agent caps libraries that the trainer has newer, so it lives in an environment of its own, made for these tests;
STARLING_CLEARML_AGENT names one that is there already.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from starling.cli import hpo, train
from tests.conftest import REPOSITORY
from tests.doubles.clearml_server import ClearmlServerDouble

ENDED = {"completed", "failed", "stopped"}
METRIC = "metrics/mAP_0.5:0.95"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("clearml_alone")]


@pytest.fixture(scope="module")
def agent_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the agent's command, installed as the agent's image installs it."""
    if given := os.environ.get("STARLING_CLEARML_AGENT"):
        return Path(given)
    home = tmp_path_factory.mktemp("agent")
    venv.create(home, with_pip=True)
    requirements = REPOSITORY / "deploy" / "clearml" / "requirements.txt"
    words = ["-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", str(requirements)]
    done = subprocess.run(
        [str(home / "bin" / "python"), *words], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        message = f"clearml-agent cannot be installed: {done.stderr[-300:]}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return home / "bin" / "clearml-agent"


@pytest.fixture
def agent(
    agent_program: Path, clearml_server: ClearmlServerDouble, tmp_path: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `clearml-agent daemon --queue default` with the trainer's own Python, as the agent's container does."""
    own = {
        "CLEARML_AGENT_SKIP_PYTHON_ENV_INSTALL": "1",
        "CLEARML_AGENT_SKIP_PIP_VENV_INSTALL": sys.executable,
    }
    words = ["daemon", "--foreground", "--queue", "default", "--create-queue", "--cpu-only"]
    with open(tmp_path / "agent.log", "wb") as output:
        process = subprocess.Popen(
            [str(agent_program), *words], env={**os.environ, **own}, cwd=tmp_path, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(
    what: Callable[[], bool], agent: subprocess.Popen[bytes], log: Path, seconds: float = 150
) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        assert agent.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)


def test_the_real_agent_trains_what_was_queued_with_what_the_page_changed_and_hpo_goes_on_from_it(
    agent: subprocess.Popen[bytes],
    clearml_server: ClearmlServerDouble,
    tiny_args: list[str],
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = tmp_path / "agent.log"
    wait_for(lambda: bool(clearml_server.records.workers and clearml_server.records.queues), agent, log)
    words = [
        *tiny_args,
        "--project",
        "blood/cells",
        "--name",
        "far",
        "--save-period",
        "2",
        "--bbox_interval",
        "1",
        "--remote",
    ]
    assert train.main([*words, "defualt"]) == 2
    assert "did you mean 'default'" in capsys.readouterr().err
    assert clearml_server.records.tasks == {}

    # Paused, so that the page can be edited before the agent takes the task.
    os.killpg(agent.pid, signal.SIGSTOP)
    assert train.main([*words, "default", "--json"]) == 0
    identity = json.loads(capsys.readouterr().out)["task"]
    task = clearml_server.records.tasks[identity]
    assert clearml_server.records.project_of(task) == "blood/cells"
    task["hyperparams"]["Args"]["epochs"]["value"] = "3"
    task["hyperparams"]["Hyp"]["lr0"]["value"] = "0.0123"
    os.killpg(agent.pid, signal.SIGCONT)
    wait_for(lambda: task["status"] in ENDED, agent, log)
    assert task["status"] == "completed", clearml_server.records.console(identity)[-3000:]
    assert "terminated" not in log.read_text(), "the agent ended the training before it had ended itself"

    folder = runs / "blood" / "cells" / "far"
    with open(folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    points = clearml_server.records.scalars(identity)["metrics", "mAP_0.5:0.95"]
    assert [point[0] for point in points] == [0, 1, 2]
    assert [point[1] for point in points] == pytest.approx([float(row[METRIC]) for row in rows], rel=1e-4)
    assert "lr0: 0.0123" in (folder / "hyp.yaml").read_text()
    wait_for(lambda: "results in" in clearml_server.records.console(identity), agent, log)
    assert clearml_server.records.console(identity).count("epoch 3/3") == 1
    assert len(clearml_server.records.tasks) == 1
    assert {model["name"] for model in task["models"]["output"]} == {"epoch1", "best"}
    images = clearml_server.records.of_type(identity, "training_debug_image")
    assert [image["iter"] for image in images if image["variant"] == "val_batch0_pred"] == [0, 1, 2]
    assert len({image["url"] for image in images}) == len(images)
    assert {"confusion matrix", "results", "PR_curve"} <= {
        plot["metric"] for plot in clearml_server.records.of_type(identity, "plot")
    }
    assert clearml_server.records.arguments(task, "properties")["train images"] == "8"

    os.kill(agent.pid, signal.SIGTERM)
    agent.wait(20)
    assert clearml_server.records.workers == {}

    assert hpo.main(["--trials", "1", "--epochs", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trial = clearml_server.records.tasks[found["best_task"]]
    assert (found["finished"], found["failed"]) == (1, 0)
    assert (trial["status"], trial["parent"]) == ("completed", found["task"])
    assert clearml_server.records.scalars(trial["id"])["metrics", "mAP_0.5:0.95"] == [
        (0, pytest.approx(found["best_value"]))
    ]
    assert "lr0: 0.0123" in Path(found["hyp"]).read_text()
