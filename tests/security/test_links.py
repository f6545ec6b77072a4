"""No link, second name or pipe below a runs folder makes a command write, delete or wait outside it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from starling import settings
from starling.cli import detect, export, train, val
from starling.cli.data import main as data_command
from starling.core.files import atomic
from starling.core.files.atomic import append_line, atomic_path, sweep, write_atomic
from starling.core.files.folder import LinkRefused
from starling.core.files.refusals import FileRefused
from starling.core.files.safe_open import name_top, open_file, remove, remove_tree

Tree = dict[str, tuple[object, ...]]


def tree(folder: Path) -> Tree:
    """Return all that can be seen of a folder: names, kinds, times, numbers of names, content."""
    seen: Tree = {}
    for path in sorted([folder, *folder.rglob("*")]):
        state = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        seen[str(path)] = (
            state.st_ino,
            state.st_mode,
            state.st_nlink,
            state.st_mtime_ns,
            state.st_ctime_ns,
            content,
        )
    return seen


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Give a folder of somebody else's with what a run might have, and see that nothing in it has changed."""
    folder = tmp_path / "outside"
    for name in (
        *(
            "precious",
            "last.pt",
            "best.pt",
            "weights/last.pt",
            "weights/best.pt",
            "0000/weights/best.pt",
            "0000/x",
        ),
        *(
            ".x.0.part",
            "x.pixels",
            "mlflow.db",
            "events.jsonl",
            "a.json",
            "exp/weights/last.pt",
            "exp/.x.0.part",
        ),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("as it was\n")
    before = tree(folder)
    yield folder
    assert tree(folder) == before


Plant = Callable[[Path, Path], None]


def absolute(link: Path, target: Path) -> None:
    link.symlink_to(target)


def relative(link: Path, target: Path) -> None:
    link.symlink_to(os.path.relpath(target, link.parent))


def dangling(link: Path, target: Path) -> None:
    link.symlink_to(target.parent / "outside" / "not there" / "either")


def loop(link: Path, target: Path) -> None:
    link.symlink_to(link.name)


PLANTS: tuple[Plant, ...] = (absolute, relative, dangling, loop)


def plant(place: Path, outside: Path, how: Plant) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    how(place, outside)


@pytest.fixture
def quick(tiny_args: list[str], runs: Path) -> list[str]:
    """Return the flags of a training of one epoch in `train/exp`, without trackers and images."""
    settings.update({"mlflow": False, "tensorboard": False})
    return [*tiny_args, "--noplots", "--noval", "--epochs", "1", "--exist-ok"]


SEARCH = ["--project", "blood", "--name", "search", "--evolve", "1"]


@pytest.mark.parametrize("how", PLANTS)
@pytest.mark.parametrize(
    ("place", "args"),
    [
        ("train", []),
        ("train/exp", []),
        ("train/exp/weights", []),
        ("train/exp/epochs", []),
        ("train/exp/.lock", []),
        ("blood", SEARCH),
        ("blood/search", SEARCH),
        ("blood/search/study.journal", SEARCH),
        ("blood/search/study.lock", SEARCH),
        ("blood/search/leases", SEARCH),
    ],
)
def test_a_link_where_a_folder_or_a_journal_belongs_is_exit_2_by_name(
    quick: list[str],
    runs: Path,
    outside: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
    args: list[str],
    how: Plant,
) -> None:
    is_file = Path(place).suffix in (".journal", ".lock") or place.endswith(".lock")
    plant(runs / place, outside / "precious" if is_file else outside, how)
    assert train.main([*quick, *args]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert str(runs / place) in said
    assert "remove the link" in said


@pytest.mark.parametrize(
    "place", ["candidates", "candidates/0000", "candidates/0000/weights", "weights", "weights.lock"]
)
def test_a_link_that_a_search_meets_on_its_way_is_exit_2_by_name(
    quick: list[str], runs: Path, outside: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    plant(runs / "blood/search" / place, outside / ("precious" if place.endswith("lock") else ""), relative)
    assert train.main([*quick, *SEARCH]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert str(runs / "blood/search" / place) in said
    assert "remove the link" in said


def test_links_where_a_search_can_do_without_are_told_and_left_alone(
    quick: list[str], runs: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = runs / "blood/search"
    folders = (runs / ".cache", runs / ".workers", search / "workers")
    files = tuple(search / name for name in ("views.lock", "picture.lock", "labels_report.csv", "evolve.csv"))
    for place in folders:
        plant(place, outside, absolute)
    for place in files:
        plant(place, outside / "precious", absolute)
    assert train.main([*quick, *SEARCH]) == 0
    said = capsys.readouterr()
    for place in (*folders, *files[:2]):
        assert f"{place}: is a symbolic link" in said.out + said.err
        assert place.is_symlink()


def test_files_that_are_replaced_as_a_whole_take_the_place_of_a_link(
    quick: list[str], runs: Path, outside: Path
) -> None:
    run = runs / "train/exp"
    names = ("results.csv", "opt.yaml", "hyp.yaml", "labels_report.csv", "weights/last.pt", "weights/best.pt",
             "weights/last.previous.pt", "events.jsonl")  # fmt: skip
    for name in names:
        plant(run / name, outside / "precious", absolute)
    assert train.main(quick) == 0
    links = [name for name in names if (run / name).is_symlink()]
    assert links == ["events.jsonl"], "the log, which is appended to, is left out with a warning"


def test_a_folder_swapped_for_a_link_while_a_training_runs_ends_it_with_exit_2(
    quick: list[str],
    runs: Path,
    outside: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from starling.training.trainer import Trainer

    whole, weights = Trainer._iterate, runs / "train/exp/weights"

    def swap(self: Trainer, *args: object) -> None:
        whole(self, *args)  # type: ignore[arg-type]
        if not weights.is_symlink():
            shutil.rmtree(weights, ignore_errors=True)
            weights.symlink_to(outside)

    monkeypatch.setattr(Trainer, "_iterate", swap)
    assert train.main(quick) == 2
    assert f"{weights}: is a symbolic link to {outside}" in capsys.readouterr().err


def test_a_folder_swapped_between_the_making_and_the_write_is_not_followed(
    runs: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs / "train/exp"

    def swap(file: object) -> None:
        folder.rename(runs / "train/moved")
        folder.symlink_to(outside)

    write_atomic(folder / "results.csv", swap)
    assert [path.name for path in (runs / "train/moved").iterdir()] == ["results.csv"]
    with pytest.raises(LinkRefused):
        write_atomic(folder / "results.csv", b"again")


def test_a_folder_swapped_while_a_library_writes_by_path_is_not_followed(runs: Path, outside: Path) -> None:
    from starling.tracking.mlflow.database import held_database

    folder = runs / "train/exp"
    with atomic_path(folder / "best.pt") as path:
        folder.rename(runs / "train/moved")
        folder.symlink_to(outside)
        path.write_bytes(b"x")
    assert [path.name for path in (runs / "train/moved").iterdir()] == ["best.pt"]
    database = held_database(runs)
    (runs / "mlflow").rename(runs / "moved")
    (runs / "mlflow").symlink_to(outside)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE one (x)")
    assert (runs / "moved/mlflow.db").stat().st_size > 0


def test_no_way_to_write_append_or_remove_goes_through_a_link(runs: Path, outside: Path) -> None:
    plant(runs / "train/exp", outside, absolute)
    run = runs / "train/exp"
    ways: tuple[Callable[[], object], ...] = (
        lambda: write_atomic(run / "precious", b"x"),
        lambda: atomic_path(run / "precious").__enter__(),
        lambda: append_line(run / "precious", "x"),
        lambda: sweep(run),
        lambda: remove(run / "precious"),
        lambda: remove_tree(run / "weights"),
        lambda: atomic.fsync_directory(run),
        lambda: open_file(run / "precious", os.O_WRONLY | os.O_TRUNC),
    )
    for way in ways:
        with pytest.raises(LinkRefused):
            way()
    remove_tree(run)
    assert run.is_symlink()


def test_a_project_named_elsewhere_may_be_a_link_and_none_below_it_is_followed(
    quick: list[str], runs: Path, outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "big").mkdir()
    project = tmp_path / "project"
    project.symlink_to(tmp_path / "big")
    args = [*quick, "--project", str(project)]
    assert train.main(args) == 0
    assert (tmp_path / "big/exp/weights/best.pt").is_file()
    shutil.rmtree(project / "exp/weights")
    (project / "exp/weights").symlink_to(outside)
    assert train.main(args) == 2
    assert f"{project}/exp/weights" in capsys.readouterr().err


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Return the weights of a tiny training."""
    from tests.conftest import TINY_LAYOUT

    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("trained")
    patch.setenv("STARLING_RUNS", str(root / "runs"))
    settings.update({"mlflow": False, "tensorboard": False})
    args = [
        "--data",
        str(tiny_data),
        "--weights",
        "",
        "--cfg",
        str(TINY_LAYOUT),
        "--img",
        "64",
        "--batch",
        "4",
    ]
    assert train.main([*args, "--epochs", "1", "--device", "cpu", "--noplots", "--noval"]) == 0
    patch.undo()
    return root / "runs/train/exp/weights/best.pt"


@pytest.mark.parametrize("place", ["", "exp", "exp/labels", "exp/crops"])
def test_detect_writes_through_no_link(
    runs: Path, outside: Path, weights: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    link = runs / "detect" / place
    plant(link, outside, relative)
    source = str(tiny_data.parent / "images/val")
    args = [
        "--weights",
        str(weights),
        "--source",
        source,
        "--img",
        "64",
        "--conf",
        "0.0001",
        "--device",
        "cpu",
    ]
    args += ["--save-txt", "--save-crop", "--save-csv", "--exist-ok", "--max-det", "2"]
    assert detect.main(args) == 2
    assert f"{link}: " in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "exp", "exp/labels"])
def test_val_writes_through_no_link(
    runs: Path, outside: Path, weights: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    link = runs / "val" / place
    plant(link, outside, absolute)
    args = [
        "--weights",
        str(weights),
        "--data",
        str(tiny_data),
        "--img",
        "64",
        "--device",
        "cpu",
        "--save-txt",
    ]
    assert val.main([*args, "--exist-ok"]) == 2
    assert f"{link}: " in capsys.readouterr().err


def test_export_resume_and_the_cache_go_through_no_link(
    runs: Path, outside: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(weights.parents[1], runs / "train/exp")
    (runs / "train/exp/weights").rename(outside.parent / "kept")
    (runs / "train/exp/weights").symlink_to(outside.parent / "kept")
    before = tree(outside.parent / "kept")
    linked = runs / "train/exp/weights"
    assert export.main(["--weights", str(linked / "best.pt"), "--include", "torchscript", "--img", "64"]) == 2
    assert f"{linked}: is a symbolic link" in capsys.readouterr().err
    assert train.main(["--resume", str(linked / "last.pt"), "--epochs", "2"]) == 2
    assert f"{linked}: " in capsys.readouterr().err
    assert tree(outside.parent / "kept") == before
    shutil.rmtree(runs / ".cache", ignore_errors=True)
    plant(runs / ".cache", outside, absolute)
    assert data_command(["cache", "--remove"]) == 2
    assert f"{runs / '.cache'}: is a symbolic link" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "code"),
    [("events.jsonl", 0), (".lock", 2), ("study.journal", 2), ("study.lock", 2), ("weights.lock", 2)],
)
@pytest.mark.parametrize("kind", ["second name", "pipe"])
def test_a_second_name_of_somebody_elses_file_and_a_pipe_are_refused_where_a_file_grows(
    quick: list[str],
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    code: int,
    kind: str,
) -> None:
    search = name in ("study.journal", "study.lock", "weights.lock")
    place = runs / ("blood/search" if search else "train/exp") / name
    place.parent.mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_text("as it was\n")
    if kind == "pipe":
        os.mkfifo(place)
    else:
        os.link(precious, place)
    assert train.main([*quick, *(SEARCH if search else [])]) == code
    said = capsys.readouterr()
    assert any(f"{place}: {word} " in said.out + said.err for word in ("is", "exists"))
    assert precious.read_text() == "as it was\n"


@pytest.mark.parametrize(
    ("place", "args"),
    [
        ("train", []),
        ("train/exp", []),
        ("train/exp/weights", []),
        ("blood", SEARCH),
        ("blood/search", SEARCH),
    ],
)
def test_a_pipe_in_place_of_a_folder_is_exit_2_by_name(
    quick: list[str], runs: Path, capsys: pytest.CaptureFixture[str], place: str, args: list[str]
) -> None:
    (runs / place).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(runs / place)
    assert train.main([*quick, *args]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {runs / place}: ")
    assert said.count("\n") == 1
    assert "what is there" in said


def test_a_folder_in_place_of_a_file_is_named_by_the_files_own_name(
    quick: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("results.csv", "opt.yaml", "summary.json", "weights/last.previous.pt"):
        shutil.rmtree(runs / "train", ignore_errors=True)
        (runs / "train/exp" / name / "inside").mkdir(parents=True)
        if name.startswith("weights"):
            (runs / "train/exp/weights/last.pt").touch()
        assert train.main(quick) == 2, name
        said = capsys.readouterr().err
        assert said.startswith(f"error: {runs}/train/exp/{name}: ")
        assert said.count("\n") == 1
        assert (runs / "train/exp" / name / "inside").is_dir()


def test_a_file_of_ours_that_somebody_made_endless_is_refused_unread(runs: Path) -> None:
    from starling.core.files.safe_open import read_file

    runs.mkdir(exist_ok=True)
    (runs / "settings.json").touch()
    os.truncate(runs / "settings.json", 1 << 40)
    with pytest.raises(FileRefused, match="more than 16 MiB"):
        read_file(runs / "settings.json")


def test_pipes_hang_no_reader(quick: list[str], runs: Path) -> None:
    for place in (".workers/r.json", "train/exp/results.csv", "train/exp/events.mlflow.cursor"):
        (runs / place).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(runs / place)
    from starling.core.worker_status import read_status
    from starling.tracking.cursor import Cursor

    assert read_status(runs / ".workers/r.json") == {}
    assert Cursor.load(runs / "train/exp/events.jsonl", "mlflow", "x").offset == 0
    assert train.main(quick) == 0


def test_the_embedded_database_is_kept_behind_no_link(runs: Path, outside: Path) -> None:
    from starling.tracking.mlflow.database import held_database

    plant(runs / "mlflow", outside, absolute)
    with pytest.raises(LinkRefused):
        held_database(runs)
    (runs / "mlflow").unlink()
    plant(runs / "mlflow/mlflow.db-journal", outside / "precious", absolute)
    with pytest.raises(LinkRefused):
        held_database(runs)


def test_a_named_top_below_the_runs_folder_loosens_nothing(runs: Path, outside: Path) -> None:
    plant(runs / "blood", outside, absolute)
    name_top(runs / "blood")
    with pytest.raises(LinkRefused):
        write_atomic(runs / "blood/precious", b"x")


def test_a_runs_folder_that_is_a_link_is_resolved_once(runs: Path, outside: Path, tmp_path: Path) -> None:
    runs.rename(tmp_path / "big")
    (tmp_path / "other").symlink_to(tmp_path / "big")
    name_top(tmp_path / "other")
    write_atomic(tmp_path / "other/exp/a", b"x")
    (tmp_path / "other").unlink()
    (tmp_path / "other").symlink_to(outside)
    write_atomic(tmp_path / "other/exp/b", b"x")
    assert sorted(path.name for path in (tmp_path / "big/exp").iterdir()) == ["a", "b"]
