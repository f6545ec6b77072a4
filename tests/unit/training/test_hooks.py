from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from starling import settings
from starling.cli import train
from starling.core.errors import UsageError
from starling.tracking.events import Event, read_events
from starling.training.reporting import hooks
from starling.training.reporting.hooks import NAMES, find_hooks
from starling.training.reporting.provenance import code_version


@pytest.fixture(autouse=True)
def _no_trackers(runs: Path) -> Iterator[None]:
    settings.update({"mlflow": False, "tensorboard": False})
    yield
    hooks.clear()


@pytest.fixture
def quick_args(tiny_args: list[str]) -> list[str]:
    return [*tiny_args, "--noplots"]


def events_of(run: Path, name: str) -> list[Event]:
    found, _ = read_events(run / "events.jsonl")
    return [event for event in found if event.name == name]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "my_hooks.py"


def test_a_hook_adds_a_metric_and_an_artifact(quick_args: list[str], runs: Path, file: Path) -> None:
    (file.parent / "outside.txt").write_text("from elsewhere")
    file.write_text(f"""
def on_fit_epoch_end(training):
    training.metrics["custom/epochs_done"] = training.epoch + 1
    training.metrics["note"] = "no number"

def on_train_end(training):
    (training.save_dir / "notes.txt").write_text("done")
    training.log_artifact("notes.txt")
    training.log_artifact({str(file.parent / "outside.txt")!r})
""")
    assert train.main([*quick_args, "--hooks", str(file)]) == 0
    run = runs / "train" / "exp"
    values = [event.fields["values"] for event in events_of(run, "metrics")]
    assert [row["custom/epochs_done"] for row in values] == [1, 2]
    assert all("note" not in row and "train/box_loss" in row for row in values)
    assert "custom" not in (run / "results.csv").read_text()
    paths = [event.fields["path"] for event in events_of(run, "artifact")]
    assert {"notes.txt", "artifacts/outside.txt"} <= set(paths)
    assert (run / "artifacts" / "outside.txt").read_text() == "from elsewhere"


def test_hooks_given_in_python_are_called_in_order(quick_args: list[str]) -> None:
    called: list[str] = []
    for name in NAMES:
        hooks.add(name, lambda training, name=name: called.append(name))  # type: ignore[misc]
    assert train.main([*quick_args, "--epochs", "1"]) == 0
    batches = ["on_train_batch_start", "on_train_batch_end"]
    assert called == [*NAMES[:4], *batches, *batches, *NAMES[6:]]


def test_a_failing_hook_is_one_warning_with_file_and_line_and_never_ends_the_training(
    quick_args: list[str], file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("def on_train_batch_end(training):\n    training.nothing_of_this_name\n")
    monkeypatch.setenv("STARLING_HOOKS", str(file))
    assert train.main(quick_args) == 0
    output = capsys.readouterr().out
    assert output.count("warning: the hook") == 1
    assert f"{file}, line 2: AttributeError" in output


def test_a_hook_that_exits_does_not_end_the_training(quick_args: list[str]) -> None:
    hooks.add("on_train_start", lambda training: sys.exit(3))
    assert train.main([*quick_args, "--epochs", "1"]) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("def on_fit_epoch_en(training): pass", "did you mean 'on_fit_epoch_end'"),
        ("1/0", "line 1: ZeroDivisionError"),
        ("def f(:", "line 1: SyntaxError"),
    ],
)
def test_a_file_that_gives_no_hooks_is_refused_before_anything_is_made(
    quick_args: list[str],
    runs: Path,
    file: Path,
    content: str | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        file.write_text(content)
    assert train.main([*quick_args, "--hooks", str(file)]) == 2
    assert said in capsys.readouterr().err
    assert not (runs / "train").exists()


def test_a_hook_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'on_train_end'"):
        hooks.add("on_trainend", print)
    assert find_hooks("", {}) == {}


def test_images_by_epoch_are_drawn_as_often_as_asked(tiny_args: list[str], runs: Path) -> None:
    assert train.main([*tiny_args, "--epochs", "3", "--bbox_interval", "2"]) == 0
    run = runs / "train" / "exp"
    assert [path.name for path in (run / "epochs").iterdir()] == ["val_batch0_pred_epoch1.jpg"]
    [event] = events_of(run, "picture")
    assert (event.fields["name"], event.fields["step"]) == ("val_batch0_pred", 1)


def test_a_run_tells_its_data_its_code_its_console_and_its_model(
    quick_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARLING_IMAGE", "sha256:0123")
    monkeypatch.setenv("STARLING_REPLICA", "gpu3")
    assert train.main([*quick_args, "--save-period", "1"]) == 0
    run = runs / "train" / "exp"
    [start] = events_of(run, "run_start")
    tags = start.fields["tags"]
    assert (tags["seed"], tags["image"], tags["replica"]) == ("0", "sha256:0123", "gpu3")
    assert tags["host"] == platform.node()
    version = code_version()
    assert start.fields["tags"].get("git_commit", "") == version.commit
    assert (run / "uncommitted.diff").is_file() == bool(version.diff)
    train_set, val_set = (event.fields for event in events_of(run, "dataset"))
    assert (train_set["role"], train_set["figures"]["images"]) == ("train", 8)
    assert (val_set["role"], val_set["figures"]["images"]) == ("val", 4)
    assert train_set["digest"] == start.fields["tags"]["data_digest"] != val_set["digest"]
    said = [event.fields["text"] for event in events_of(run, "message")]
    assert any(line.startswith("run: ") for line in said), "what was said before the log was opened"
    assert sum(line.startswith("epoch ") for line in said) == 2
    models = [(event.fields["name"], event.fields["path"]) for event in events_of(run, "model")]
    assert models[:2] == [("epoch0", "weights/epoch0.pt"), ("epoch1", "weights/epoch1.pt")]
    assert models[2] == ("best", "weights/best.pt")


@pytest.mark.parametrize("built_of", ["c" * 40, "c" * 40 + "-dirty"])
def test_an_image_without_a_repository_tells_the_commit_it_was_built_of(
    built_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code_version.cache_clear()
    monkeypatch.setenv("STARLING_COMMIT", built_of)
    tags = code_version(Path("/proc")).tags()
    code_version.cache_clear()
    assert tags == {"git_commit": "c" * 40, "git_dirty": str(built_of.endswith("-dirty"))}


def test_uncommitted_changes_are_kept_and_credentials_in_them_are_not(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        names = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, env={**os.environ, **names})

    git("init", "--quiet")
    (tmp_path / "a.py").write_text("one = 1\n")
    git("add", "a.py")
    git("commit", "--quiet", "-m", "first")
    clean = code_version(tmp_path)
    assert len(clean.commit) == 40
    assert clean.diff == ""
    code_version.cache_clear()
    (tmp_path / "a.py").write_text("one = 2\n")
    assert "+one = 2" in code_version(tmp_path).diff
    code_version.cache_clear()
    assert code_version(Path("/proc")).tags() == {}
