"""Nothing is written outside the runs folder, whatever the names and the links in it say."""

from __future__ import annotations

from pathlib import Path

import pytest

from starling.cli import train


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Return a folder with one file of somebody else's."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("as it was")
    return folder


def untouched(folder: Path) -> bool:
    return [path.name for path in folder.iterdir()] == ["precious"] and (
        folder / "precious"
    ).read_text() == "as it was"


@pytest.mark.parametrize("search", [[], ["--evolve", "1"]])
@pytest.mark.parametrize(
    "where",
    [
        ["--project", "../../etc"],
        ["--project", "runs/../../outside"],
        ["--project", "a/../../outside"],
        ["--name", "../x"],
        ["--name", "/etc/x"],
        ["--name", ".."],
    ],
)
def test_a_project_or_name_that_climbs_out_is_exit_2_and_writes_nothing(
    tiny_args: list[str],
    runs: Path,
    outside: Path,
    capsys: pytest.CaptureFixture[str],
    where: list[str],
    search: list[str],
) -> None:
    before = sorted(runs.parent.rglob("*"))
    assert train.main([*tiny_args, *where, *search]) == 2
    assert where[1] in capsys.readouterr().err
    new = [path for path in runs.parent.rglob("*") if path not in before and runs not in path.parents]
    assert new in ([], [runs])
    assert untouched(outside)
    assert not list(runs.rglob("*.pt"))


@pytest.mark.parametrize(
    ("link", "args"),
    [
        ("blood", ["--project", "blood"]),
        ("blood", ["--project", "blood/inner"]),
        ("train/exp", ["--exist-ok"]),
        ("train/exp/weights", ["--exist-ok"]),
        ("train/exp/epochs", ["--exist-ok"]),
        ("blood", ["--project", "blood", "--name", "search", "--evolve", "1"]),
        ("blood/search", ["--project", "blood", "--name", "search", "--evolve", "1"]),
    ],
)
def test_a_link_out_of_the_runs_folder_is_exit_2_and_nothing_goes_through_it(
    tiny_args: list[str],
    runs: Path,
    outside: Path,
    capsys: pytest.CaptureFixture[str],
    link: str,
    args: list[str],
) -> None:
    (runs / link).parent.mkdir(parents=True, exist_ok=True)
    (runs / link).symlink_to(outside)
    assert train.main([*tiny_args, "--noplots", *args]) == 2
    assert str(outside) in capsys.readouterr().err
    assert untouched(outside)


@pytest.mark.parametrize(
    "name", [".lock", "events.jsonl", "results.csv", "hyp.yaml", "weights/last.pt", "weights/best.pt"]
)
def test_a_linked_file_in_a_run_folder_never_changes_what_it_points_to(
    tiny_args: list[str], runs: Path, outside: Path, name: str
) -> None:
    link = runs / "train" / "exp" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "precious")
    code = train.main([*tiny_args, "--noplots", "--noval", "--epochs", "1", "--exist-ok"])
    assert code == (2 if name == ".lock" else 0)
    assert untouched(outside)


def test_a_link_inside_the_runs_folder_and_a_linked_runs_folder_are_fine(
    tiny_args: list[str], runs: Path, tmp_path: Path
) -> None:
    runs.rename(tmp_path / "big-disk")
    (tmp_path / "big-disk" / "train").mkdir()
    runs.symlink_to(tmp_path / "big-disk")
    (runs / "blood").symlink_to(runs / "train")
    assert train.main([*tiny_args, "--noplots", "--noval", "--epochs", "1", "--project", "blood"]) == 0
    assert (tmp_path / "big-disk" / "train" / "exp" / "weights" / "best.pt").is_file()
