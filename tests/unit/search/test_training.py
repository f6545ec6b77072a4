"""A search from its command line: real workers, real trainings, one study."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optuna.trial import FrozenTrial

from starling import settings
from starling.cli import train
from starling.config.yaml_reader import read_yaml
from starling.core.errors import CheckpointError
from starling.core.settings.train import TrainConfig
from starling.data.loader.loader import Batch
from starling.model.checkpoint import load_checkpoint
from starling.search.outcome import State, best_of
from starling.search.pruning import Halving
from starling.search.study import SearchStudy
from starling.training.trainer import Trainer
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    """Keep the bridge out: it has tests of its own, and importing MLflow takes seconds."""
    settings.update({"mlflow": False, "tensorboard": False})


@pytest.fixture
def search_args(tiny_args: list[str]) -> list[str]:
    return [*tiny_args, "--epochs", "1", "--project", "blood", "--name", "search", "--evolve", "4"]


def worker(args: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "app/train.py", *args],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def trainings(runs: Path) -> list[dict[str, str]]:
    with open(runs / "blood" / "search" / "evolve.csv") as file:
        return list(csv.DictReader(file))


def test_two_workers_share_one_budget_and_never_train_the_same_candidate(
    search_args: list[str], runs: Path
) -> None:
    workers = [worker(search_args) for _ in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in workers]
    assert [process.returncode for process in workers] == [0, 0], outputs
    rows = trainings(runs)
    assert len(rows) == 4
    hyps = [tuple(value for key, value in row.items() if "/" not in key) for row in rows]
    assert len(set(hyps)) == 4
    assert all("search finished: 4 trainings" in output for output in outputs)


def test_a_search_leaves_its_views_and_the_winners_weights_and_images(
    search_args: list[str], runs: Path
) -> None:
    assert train.main([*search_args, "--evolve", "2"]) == 0
    search = runs / "blood" / "search"
    files = ["evolve.csv", "hyp_evolve.yaml", "evolve.png", "report.html", "weights/best.pt", "labels.jpg",
             "val_batch0_pred.jpg", "confusion_matrix.png", "candidates/0001/results.csv"]  # fmt: skip
    assert [name for name in files if not (search / name).is_file()] == []
    assert not list(search.glob("candidates/*/weights")), "weights of every candidate would fill the disk"
    best = max(trainings(runs), key=lambda row: float(row["metrics/mAP_0.5:0.95"]))
    assert read_yaml(search / "hyp_evolve.yaml")["lr0"] == float(best["lr0"])


def test_pruned_search_keeps_only_the_winners_weights_and_meets_its_budget(
    search_args: list[str],
    runs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def every_other(halving: Halving, trials: list[FrozenTrial], number: int, epoch: int) -> str | None:
        """Judge as trainings of seconds cannot be: all of them have next to no fitness."""
        assert trials[number].intermediate_values[epoch] >= 0
        return f"fitness of number {number}" if number % 2 else None

    monkeypatch.setattr(Halving, "verdict", every_other)
    asked = ["--epochs", "3", "--evolve", "20", "--prune", "--finalists", "2"]
    assert train.main([*search_args, *asked]) == 0
    search = runs / "blood" / "search"
    study = SearchStudy.read(search)
    progress, finished = study.progress(), study.finished()
    assert progress.pruned > 0
    assert 19 < progress.spent <= 20
    finals = [training for training in finished if training.finalist_of is not None]
    assert len(finals) == 4
    rows = read_yaml(search / "hyp_evolve.yaml")
    winner = best_of(finished)
    assert rows["lr0"] == winner.hyp["lr0"]
    kept = load_checkpoint(search / "weights" / "best.pt")
    assert kept["hyp"]["lr0"] == winner.hyp["lr0"]
    assert kept["config"]["seed"] in (1, 2)
    assert not list(search.glob("candidates/*/weights"))
    pruned = next(attempt for attempt in study.attempts() if attempt.state is State.PRUNED)
    assert f"candidate {pruned.number}: pruned: fitness" in capsys.readouterr().out
    events = [json.loads(line) for file in search.glob("workers/*/events.jsonl") for line in file.open()]
    assert sum(event.get("status") == "pruned" for event in events) == progress.pruned


def test_the_report_knows_the_command_and_the_images_of_the_trainings(
    search_args: list[str], runs: Path, tiny_data: Path
) -> None:
    assert train.main([*search_args, "--evolve", "1"]) == 0
    study = SearchStudy.read(runs / "blood" / "search")
    assert (study.training["train_images"], study.training["val_images"]) == (8, 4)
    page = (runs / "blood" / "search" / "report.html").read_text()
    assert f"--data {tiny_data} --img 64 --batch 4 --hyp runs/blood/search/hyp_evolve.yaml" in page
    assert "images trained" in page


def test_joining_later_with_a_larger_budget_goes_on_where_the_search_was(
    search_args: list[str], runs: Path
) -> None:
    assert train.main([*search_args, "--evolve", "1"]) == 0
    assert train.main([*search_args, "--evolve", "2", "--exist-ok", "--resume"]) == 0
    assert len(trainings(runs)) == 2


def test_joining_with_another_training_is_refused_with_the_difference(
    search_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*search_args, "--evolve", "1"]) == 0
    assert train.main([*search_args, "--evolve", "2", "--epochs", "3"]) == 2
    error = capsys.readouterr().err
    assert "epochs" in error
    assert "3" in error


def test_a_stopped_workers_candidate_goes_on_from_its_checkpoint(search_args: list[str], runs: Path) -> None:
    long = [*search_args, "--evolve", "1", "--epochs", "12"]
    first = worker(long)
    last = runs / "blood" / "search" / "candidates" / "0000" / "weights" / "last.pt"
    deadline = time.monotonic() + 240
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=240)
    assert first.returncode == 143, output
    second = worker(long)
    output, _ = second.communicate(timeout=240)
    assert second.returncode == 0, output
    assert "takes over" in output
    assert "epoch 1/12" not in output, "the second worker began again"
    assert len(trainings(runs)) == 1


def test_a_diverging_candidate_fails_alone(search_args: list[str], runs: Path) -> None:
    hyp = runs.parent / "wild.yaml"
    hyp.write_text("lr0: 1.0e+30\n")
    process = worker([*search_args, "--evolve", "1", "--epochs", "3", "--hyp", str(hyp)])
    output, _ = process.communicate(timeout=240)
    assert "candidate 0: failed" in output
    assert "no longer a number" in output
    assert SearchStudy.read(runs / "blood" / "search").progress().failed >= 1


def test_a_candidate_whose_worker_died_after_its_last_epoch_is_finished_without_training(
    search_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starling.search import yolo

    def die(directory: Path, run: object, fitness: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(yolo, "keep_best_weights", die)
        assert train.main([*search_args, "--evolve", "1"]) == 130
    assert train.main([*search_args, "--evolve", "1"]) == 0
    assert (runs / "blood" / "search" / "weights" / "best.pt").is_file()


def test_a_result_that_the_study_could_not_take_is_recorded_by_the_next_worker_without_training(
    search_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(study: SearchStudy, claim: object, outcome: object) -> None:
        raise CheckpointError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(SearchStudy, "finish", refuse)
        assert train.main([*search_args, "--evolve", "1"]) == 4
    trained: list[object] = []
    monkeypatch.setattr(Trainer, "_fit_epoch", trained.append)
    assert train.main([*search_args, "--evolve", "1"]) == 0
    assert trained == []
    assert len(trainings(runs)) == 1
    search = runs / "blood" / "search"
    assert (search / "weights" / "best.pt").is_file()
    assert not list(search.glob("candidates/*/weights/*.pt")), "not even those of the interrupted attempt"


def demand_of_torch() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


def demand_of_the_host() -> None:
    bytearray(1 << 60)


@pytest.mark.parametrize("demand", [demand_of_torch, demand_of_the_host])
def test_a_training_out_of_memory_fails_its_candidate_with_the_reason_and_the_worker_goes_on(
    search_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch, demand: Callable[[], None]
) -> None:
    whole = Trainer._iterate

    def iterate(trainer: Trainer, batch: Batch, position: int) -> None:
        if trainer.run.path.name == "0001" and trainer.epoch == 1:
            demand()
        whole(trainer, batch, position)

    monkeypatch.setattr(Trainer, "_iterate", iterate)
    assert train.main([*search_args, "--evolve", "2", "--epochs", "2"]) == 0
    search = runs / "blood" / "search"
    attempts = SearchStudy.read(search).attempts()
    assert [a.state for a in attempts] == [State.FINISHED, State.FAILED, State.FINISHED]
    assert re.match(r"out of memory: .+; lower --batch or --imgsz", attempts[1].reason)
    assert len({a.worker for a in attempts}) == 1
    assert not list(search.glob("candidates/*/weights")), "not even of the one that failed"


def test_the_winners_images_are_drawn_anew_for_a_better_winner_whatever_the_clock_says(
    search_args: list[str], runs: Path
) -> None:
    assert train.main([*search_args, "--evolve", "1"]) == 0
    search = runs / "blood" / "search"
    best, drawn = search / "weights" / "best.pt", search / "confusion_matrix.png"
    drawn.write_bytes(b"of the winner before")
    os.utime(drawn, (time.time() + 86_400,) * 2)
    best.unlink()  # as if whoever comes next were better
    assert train.main([*search_args, "--evolve", "2"]) == 0
    assert best.is_file()
    assert drawn.read_bytes() != b"of the winner before"


def test_the_status_file_says_how_far_the_whole_search_is(search_args: list[str], runs: Path) -> None:
    assert train.main([*search_args, "--evolve", "2"]) == 0
    (status,) = (json.loads(path.read_text()) for path in (runs / ".workers").glob("*.json"))
    assert status["finished"] == status["budget"] == 2
    assert status["best_fitness"] is not None
    assert status["phase"] == "done"
    assert status["search_ends_at"] is None


def write_space(runs: Path, text: str) -> str:
    """Write a space and return its path."""
    path = runs.parent / "space.yaml"
    path.write_text(text)
    return str(path)


def configs(runs: Path) -> list[dict[str, object]]:
    """Return what the trackers were told of each candidate, in the order of their beginning."""
    (log,) = (runs / "blood" / "search" / "workers").glob("*/events.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return [event["params"] for event in events if event["event"] == "run_start" and event.get("parent")]


def test_a_search_over_optimizer_and_batch_size_trains_with_them_and_says_so(
    search_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = write_space(
        runs, "lr0: {lower: 0.001, upper: 0.02, log: true}\nbatch_size: [2, 4]\noptimizer: [SGD, AdamW]\n"
    )
    assert train.main([*search_args, "--evolve", "5", "--space", space, "--sampler", "qmc"]) == 0
    rows = trainings(runs)
    assert list(rows[0])[-2:] == ["batch_size", "optimizer"]
    assert (rows[0]["batch_size"], rows[0]["optimizer"]) == ("4", "SGD"), (
        "the first is what the command line says"
    )
    assert {row["batch_size"] for row in rows} == {"2", "4"}
    assert {row["optimizer"] for row in rows} == {"SGD", "AdamW"}
    assert len({row["lr0"] for row in rows}) == 5
    assert len({row["momentum"] for row in rows}) == 1, "a gene that the space leaves out keeps its value"
    trained = [(str(config["batch_size"]), config["optimizer"]) for config in configs(runs)]
    assert trained == [(row["batch_size"], row["optimizer"]) for row in rows]
    best = max(rows, key=lambda row: float(row["metrics/mAP_0.5:0.95"]))
    flags = f"--batch-size {best['batch_size']} --optimizer {best['optimizer']}"
    assert f"# trained with: {flags}\n" in (runs / "blood" / "search" / "hyp_evolve.yaml").read_text()
    assert f"trained with {flags}" in capsys.readouterr().out
    (study,) = [SearchStudy.read(runs / "blood" / "search")]
    assert [trial.user_attrs["sampler"] for trial in study._trials()] == ["seed", *["qmc"] * 4]


def test_a_search_over_image_size_and_layout_changes_its_workshop_and_keeps_one_data_a_size(
    search_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starling.search import yolo as setups

    opened: list[tuple[int, str]] = []
    whole = setups.open_setup

    def note(config: TrainConfig, *rest: object) -> object:
        opened.append((config.imgsz, Path(config.cfg).stem))
        return whole(config, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(setups, "open_setup", note)
    other = runs.parent / "wider.yaml"
    tiny = search_args[search_args.index("--cfg") + 1]
    other.write_text(Path(tiny).read_text().replace("width_multiple: 0.06", "width_multiple: 0.1"))
    space = write_space(runs, f"imgsz: [64, 96]\ncfg: [{tiny}, {other}]\n")
    assert train.main([*search_args, "--evolve", "4", "--space", space, "--sampler", "random"]) == 0
    rows = trainings(runs)
    assert {(row["imgsz"], row["cfg"]) for row in rows} == {
        (s, c) for s in ("64", "96") for c in (tiny, str(other))
    }
    assert opened[0] == (64, "tiny")
    assert [size for size, _ in opened] == [64, 96], "layouts of one image size share its data"
    assert [(config["imgsz"], config["cfg"]) for config in configs(runs)] == [
        (int(r["imgsz"]), r["cfg"]) for r in rows
    ]
    assert (runs / "blood" / "search" / "confusion_matrix.png").is_file()


def test_joining_with_another_space_is_refused_with_the_difference(
    search_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = write_space(runs, "lr0: {lower: 0.001, upper: 0.02}\n")
    assert train.main([*search_args, "--evolve", "1", "--space", space]) == 0
    write_space(runs, "lr0: {lower: 0.001, upper: 0.03}\nmomentum: {lower: 0.8, upper: 0.9}\n")
    assert train.main([*search_args, "--evolve", "2", "--space", space]) == 2
    error = capsys.readouterr().err
    assert "space.lr0.upper: 0.02 in the study, 0.03 here" in error
    assert "space.momentum.lower: None in the study, 0.8 here" in error
    write_space(runs, "lr0: {upper: 0.02, lower: 0.001, gain: 1.0}\n")
    assert train.main([*search_args, "--evolve", "2", "--space", space, "--sampler", "random"]) == 0


def test_a_stopped_candidate_goes_on_with_its_own_settings(
    search_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starling.search import yolo

    whole, calls = yolo.train_in, iter(range(9))

    def stop_in_the_second(*given: object, **more: object) -> object:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return whole(*given, **more)  # type: ignore[arg-type]

    space = write_space(runs, "batch_size: [2, 4]\nlr0: {lower: 0.001, upper: 0.02}\n")
    arguments = [*search_args, "--evolve", "2", "--space", space, "--sampler", "random"]
    with monkeypatch.context() as patched:
        patched.setattr(yolo, "train_in", stop_in_the_second)
        assert train.main(arguments) == 130
    assert train.main(arguments) == 0
    attempts = SearchStudy.read(runs / "blood" / "search").attempts()
    assert [attempt.root for attempt in attempts] == [0, 1, 1]
    assert attempts[1].settings == attempts[2].settings
    assert configs(runs)[-1]["batch_size"] == attempts[1].settings["batch_size"]
