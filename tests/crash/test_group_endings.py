"""Two processes that train one model are killed, or refused by the disk, in the end of the training: a resume finishes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from starling import settings
from starling.model.checkpoint import load_checkpoint
from tests.conftest import REPOSITORY
from tests.crash.children import Fault
from tests.crash.conftest import Start, Trainer
from tests.crash.test_endings import STILL, ends, files, steps_of_metrics

SAME = (
    "results.csv",
    "results.png",
    "confusion_matrix.json",
    "confusion_matrix.png",
    "PR_curve.png",
    "worst.jpg",
)
"""Files that are the same to the byte however many processes make them."""

LOST = [int(rank) for rank in os.environ.get("STARLING_END_RANKS", "0").split(",")]
"""Ranks that are killed: 0 in a training that `--patience` ends, 1 in one that does all its epochs."""
FAULTS: dict[int, tuple[Fault, Fault]] = {
    0: (("die_in_the_end", "2", "5"), ()),
    1: ((), ("die_in_the_last_validation", "2")),
}


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    """Keep the bridge out: it has tests of its own."""
    settings.update({"mlflow": False, "tensorboard": False})


def together(start: Start, args: list[str], *faults: Fault) -> list[Trainer]:
    """Start two ranks as Slurm would, without anybody who ends the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    return [start(args, fault, RANK=str(rank), **place) for rank, fault in enumerate(faults or ((), ()))]


def assert_same_end(run: Path, whole: Path) -> None:
    """Assert that a run ended as one that nobody disturbed, without another epoch."""
    assert files(run) == files(whole)
    for name in SAME:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("last.pt", "best.pt"):
        ours, theirs = (load_checkpoint(folder / "weights" / name) for folder in (run, whole))
        assert all(torch.equal(ours["ema"][key], theirs["ema"][key]) for key in theirs["ema"]), name
    assert ends(run).count("finished") == 1
    assert set(steps_of_metrics(run).values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("lost", LOST)
def test_two_processes_of_which_one_is_killed_in_the_end_name_it_and_are_finished_by_a_resume(
    start: Start, tiny_args: list[str], runs: Path, lost: int
) -> None:
    (runs.parent / "still.yaml").write_text(STILL)
    early = ["--hyp", str(runs.parent / "still.yaml"), "--epochs", "30", "--patience", "1"]
    args = [*tiny_args, *(early if lost == 0 else [])]
    assert [rank.wait(120) for rank in together(start, [*args, "--name", "whole"])] == [0, 0]
    ranks = together(start, [*args, "--name", "one"], *FAULTS[lost])
    assert ranks[lost].wait(120) == -signal.SIGKILL, ranks[lost].output
    assert ranks[1 - lost].wait(60) == 1
    assert f"error: rank {lost} (process {ranks[lost].process.pid} on " in ranks[1 - lost].output
    run, other = runs / "train" / "one", runs / "train" / "other"
    shutil.copytree(run, other)
    resumed = [*together(start, ["--resume", str(run)]), start(["--resume", str(other)])]
    assert [trainer.wait(120) for trainer in resumed] == [0, 0, 0]
    for folder in (run, other):
        assert_same_end(folder, runs / "train" / "whole")


def test_a_full_disk_in_the_end_is_read_by_the_other_rank_before_the_store_ends(
    start: Start, tiny_args: list[str]
) -> None:
    ranks = together(start, [*tiny_args, "--epochs", "1"], ("full_for", "results.png"), ())
    assert [rank.wait(120) for rank in ranks] == [6, 6], [rank.output for rank in ranks]
    for rank in ranks:
        assert "results.png: cannot be written (No space left on device)" in rank.output
        assert "is gone" not in rank.output
    assert "error: rank 0 (" in ranks[1].output


def test_a_kill_that_no_rank_is_left_to_tell_of_is_told_by_who_started_them(
    tiny_args: list[str], runs: Path, tmp_path: Path
) -> None:
    hooks = tmp_path / "hooks.py"
    hooks.write_text(
        "import os, signal, time\n\ndef teardown(event):\n    time.sleep(2)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "app/train.py", *tiny_args[:-1], "cpu,cpu", "--epochs", "1", "--noplots"]
    killed = subprocess.run([*command, "--hooks", str(hooks)], cwd=REPOSITORY, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert killed.returncode == 1
    assert killed.stderr.splitlines() == [
        "error: killed: rank 0 by SIGKILL. The last checkpoint is whole: look for what killed the process (out of memory?), "
        "then --resume"
    ]
