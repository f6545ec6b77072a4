from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from starling import settings
from starling.cli import track
from starling.core.redaction import Redaction, without_credentials
from starling.tracking.delivery import Bridge
from starling.tracking.events import EventLog
from starling.tracking.tensorboard import TensorBoardTracker
from tests.conftest import REPOSITORY

pytest.importorskip("tensorboard")


@pytest.fixture
def log(runs: Path) -> EventLog:
    """Return the log of a run of three epochs, TensorBoard being the one tracker that is on."""
    settings.update({"mlflow": False})
    run = runs / "train" / "exp"
    log = EventLog(run / "events.jsonl", "u1")
    log.append("run_start", name="exp", project="train", dir=run, params={"lr0": 0.01})
    for step in range(3):
        log.append("metrics", step=step, values={"metrics/mAP_0.5": step / 10})
    return log


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    """Read a series as TensorBoard itself does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run))
    read.Reload()
    return [(point.step, round(point.value, 4)) for point in read.Scalars(name)]


def test_tensorboard_reads_scalars_images_and_parameters(log: EventLog) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = log.path.parent
    Image.new("RGB", (30, 20)).save(run / "epoch1.jpg")
    log.append("picture", path="epoch1.jpg", name="val_batch0_pred", step=1)
    log.append("run_end", status="finished")
    Bridge(log.path, TensorBoardTracker()).deliver()
    assert [path.name for path in run.glob("events.out.tfevents*")]
    assert scalars(run, "metrics/mAP_0.5") == [(0, 0.0), (1, 0.1), (2, 0.2)]
    read = EventAccumulator(str(run))
    read.Reload()
    [image] = read.Images("val_batch0_pred")
    assert (image.step, image.width, image.height) == (1, 30, 20)
    assert image.encoded_image_string == (run / "epoch1.jpg").read_bytes()
    [params] = read.Tensors("params")
    assert b"| lr0 | 0.01 |" in params.tensor_proto.string_val[0]


def test_a_tensorboard_bridge_that_was_killed_doubles_nothing(log: EventLog) -> None:
    Bridge(log.path, TensorBoardTracker()).deliver()
    [written] = log.path.parent.glob("events.out.tfevents*")
    with open(written, "ab") as file:
        file.write(b"\x18\x00\x00")  # a record torn by the kill
    log.append("metrics", step=3, values={"metrics/mAP_0.5": 0.3})
    Bridge(log.path, TensorBoardTracker(), from_start=True).deliver()
    assert scalars(log.path.parent, "metrics/mAP_0.5") == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3)]


def test_status_counts_what_is_pending_until_sync_has_sent_it(
    log: EventLog, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert track.main(["status"]) == 1
    assert capsys.readouterr().out == f"{log.path.parent}  tensorboard: 0 sent, 4 pending\n"
    assert track.main(["sync", str(runs)]) == 0
    log.append("log_end")
    capsys.readouterr()
    assert track.main(["status", str(log.path.parent), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["tracker"], row["sent"], row["pending"], row["left_out"]) == ("tensorboard", 4, 0, 0)


def test_sync_without_a_tracker_says_how_to_turn_one_on(
    log: EventLog, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.update({"tensorboard": False})
    assert track.main(["sync", str(runs)]) == 2
    assert "starling settings" in capsys.readouterr().err


def test_a_run_is_exported_as_one_zip_without_the_bridges_own_files(
    log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = log.path.parent
    (run / "weights").mkdir()
    (run / "weights" / "best.pt").write_bytes(b"weights")
    (run / ".last.pt.1234.part").touch()
    (run / "events.mlflow.cursor").touch()
    (run / "elsewhere").symlink_to("/etc/passwd")
    assert track.main(["export", str(run)]) == 0
    with zipfile.ZipFile("exp.zip") as archive:
        assert sorted(archive.namelist()) == ["exp/events.jsonl", "exp/weights/best.pt"]
        assert archive.read("exp/weights/best.pt") == b"weights"
    assert track.main(["export", str(run)]) == 2
    assert "--force" in capsys.readouterr().err
    assert track.main(["export", str(run), "--force"]) == 0
    assert track.main(["export", str(run), "--out", str(run / "all.zip")]) == 2
    assert track.main(["export", str(tmp_path / "nowhere")]) == 2


def test_credentials_are_in_no_event(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2hunter2")
    log = EventLog(runs / "events.jsonl", "u1")
    log.append("message", text="asking postgresql://me:pw@db/x?sslpassword=abc&a=1 with hunter2hunter2")
    log.append(
        "run_start", name="n", project="p", dir=runs, params={"deep": {"bucket": "s3://key:id@host/b"}}
    )
    text = log.path.read_text()
    assert not [secret for secret in ("hunter2", "me:pw", "abc", "key:id") if secret in text]
    assert "postgresql://db/x?sslpassword=***&a=1 with ***" in text


def test_ordinary_text_is_not_blotted_out() -> None:
    redacted = Redaction(
        {"MY_TOKEN": "abc", "PGPASSWORD_FILE": "/run/secrets/password", "HOME": "/home/user"}
    )
    for text in ("abc at /run/secrets/password in /home/user", "https://host/a?page=2", "a@b.c // x"):
        assert redacted(text) == text == without_credentials(text)


def test_a_trainer_with_tracking_on_imports_nothing_more_than_with_tracking_off(runs: Path) -> None:
    code = """
import sys
from pathlib import Path
from starling import settings
import starling.training.training
from starling.tracking.events import EventLog
from starling.tracking.process import start_bridges
settings.update({"mlflow": sys.argv[1] == "on", "tensorboard": sys.argv[1] == "on"})
before = set(sys.modules)
log = EventLog(Path(sys.argv[2]) / "events.jsonl", "u")
log.append("run_start", name="n", project="p", dir=log.path.parent)
bridges = start_bridges(log)
assert len(bridges.handles) == (2 if sys.argv[1] == "on" else 0)
bridges.finish(0)
for handle in bridges.handles:
    handle.process.kill()
print(*sorted(set(sys.modules) - before))
assert not {"mlflow", "tensorboard"} & set(sys.modules), "a tracker in the trainer"
"""
    loaded = [
        subprocess.run(
            [sys.executable, "-c", code, state, str(runs / state)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.split()
        for state in ("on", "off")
    ]
    assert loaded[0] == loaded[1]
