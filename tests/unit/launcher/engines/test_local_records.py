"""The local engine's own folder below the runs folder: others may write there, and are neither followed nor believed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.devices.devices import Device
from launcher.engines.base import ReplicaSpec
from launcher.engines.labels import labels
from launcher.engines.local import supervisor
from launcher.engines.local.local import FOLDER, LocalEngine
from launcher.engines.local.log import read_log
from launcher.errors import EngineError, NameTaken
from starling.core.process import boot_id

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes another user's files")
STRANGER = 12345


def spec_for(runs: Path, name: str = "r") -> ReplicaSpec:
    return ReplicaSpec(
        name=name, fleet="a/b", device=Device("cpu", "0"), image="", image_id="", environment={},
        command=(sys.executable, "-c", "print('done')"), runs=runs,
    )  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("r.json", "r.exit.json", "r.log"):
        (folder / name).write_text("theirs\n")
    return folder


Act = Callable[[LocalEngine, Path], object]


@pytest.mark.parametrize(
    "act",
    [
        lambda engine, runs: engine.create(spec_for(runs)),
        lambda engine, runs: engine.check_names(["r"]),
        lambda engine, runs: engine.list(),
        lambda engine, runs: engine.state("x"),
        lambda engine, runs: list(read_log(runs / FOLDER / "r.log", lambda: False, follow=False, tail=None, since=None)),
        lambda engine, runs: supervisor.open_folder(str(runs / FOLDER / "r.log")),
    ],
)  # fmt: skip
def test_a_link_in_place_of_the_engines_folder_is_never_followed(act: Act, runs: Path, outside: Path) -> None:
    (runs / FOLDER).symlink_to(outside)
    try:
        assert act(LocalEngine(runs, os.getuid()), runs) in ([], None)
    except (EngineError, OSError) as error:
        assert FOLDER in str(error)  # noqa: PT017 (both an answer and a refusal are fine)
    assert {path.read_text() for path in outside.iterdir()} == {"theirs\n"}
    assert len(list(outside.iterdir())) == 3


def test_links_and_pipes_in_the_engines_folder_are_neither_read_nor_written(
    runs: Path, outside: Path
) -> None:
    engine = LocalEngine(runs, os.getuid())
    replica = engine.create(spec_for(runs))
    for name in ("r.log", "r.exit.json", "r.exit.json.part"):
        (runs / FOLDER / name).symlink_to(outside / "r.json")
    os.mkfifo(runs / FOLDER / "r.log.1")
    (runs / FOLDER / "other.json").symlink_to(outside / "r.json")
    os.mkfifo(runs / FOLDER / "pipe.json")
    engine.start(replica)
    while (state := engine.state(replica)) is not None and state.live:
        pass
    assert state is not None
    assert state.exit_code == 0
    assert [line.strip() for line in engine.logs(replica)] == ["done"]
    assert {path.read_text() for path in outside.iterdir()} == {"theirs\n"}
    engine.remove(replica)
    assert {path.read_text() for path in outside.iterdir()} == {"theirs\n"}


def test_a_log_that_is_another_files_second_name_is_not_written_to(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    os.link(victim, tmp_path / "r.log")
    supervisor.RotatedLog(supervisor.open_folder(str(tmp_path / "r.log")), "r.log").write(b"words\n")
    assert victim.read_text() == "theirs"
    assert (tmp_path / "r.log").read_text() == "words\n"


@needs_root
def test_a_record_that_somebody_else_wrote_in_the_owners_name_is_not_believed(runs: Path) -> None:
    engine = LocalEngine(runs, 0)
    found = labels(spec_for(runs), 0)
    (runs / FOLDER).mkdir()
    path = runs / FOLDER / "r.json"
    path.write_text(
        json.dumps({"id": "x", "labels": found, "created": 0, "boot": boot_id(), "pid": 2, "start_time": 0})
    )
    assert [state.name for state in engine.list()] == ["r"]
    os.chown(path, STRANGER, STRANGER)
    assert engine.list() == []
    assert engine.state("x") is None
    with pytest.raises(NameTaken, match="this name is"):
        engine.check_names(["r"])


@needs_root
def test_records_of_roots_stay_roots_when_the_runs_folder_is_handed_over(runs: Path) -> None:
    from launcher.hosts.runs_folder import runs_folder

    engine = LocalEngine(runs, 0)
    engine.create(spec_for(runs))
    with runs_folder(runs, "10001:10001"):
        assert runs.stat().st_uid == 10001
        assert (runs / FOLDER).stat().st_uid == 0
        assert [state.name for state in engine.list()] == ["r"]
