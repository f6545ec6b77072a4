"""Results go to a bucket at the end of a run, and a bucket that fails costs nothing but a line."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from starling.core.errors import UsageError
from starling.core.settings.train import TrainConfig
from starling.core.settings.values import check_bucket
from starling.outputs.bucket import check_driver, upload
from starling.training.reporting.delivery import upload_results


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "exp"
    for name in (
        "results.csv",
        "weights/best.pt",
        "candidates/0001/hyp.yaml",
        ".lock",
        "views.lock",
        "x.part",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "link.csv").symlink_to(folder / "results.csv")
    return folder


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_results_and_weights_are_copied_and_locks_and_candidates_are_not(
    scheme: str, run: Path, tmp_path: Path, said: list[str]
) -> None:
    url = f"{scheme}://{tmp_path}/bucket/mine"
    assert upload(run, url)
    filesystem, root = fsspec.core.url_to_fs(url)
    found = sorted(path.split("/mine/")[1] for path in filesystem.find(root))
    assert found == ["results.csv", "weights/best.pt"]
    assert filesystem.cat_file(f"{root}/weights/best.pt") == b"weights/best.pt"
    assert said == [f"--bucket: 2 files copied to {url}"]


def test_second_upload_replaces_what_the_first_one_left(run: Path) -> None:
    url = "memory://twice/a"
    for text in ("one", "two"):
        (run / "results.csv").write_text(text)
        assert upload(run, url)
    assert fsspec.open(f"{url}/results.csv").open().read() == b"two"


def test_bucket_that_fails_is_one_warning(run: Path, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "a-file").write_text("in the way")
    assert not upload(run, f"file://{tmp_path}/a-file/mine")
    assert len(said) == 1
    assert str(run) in said[0]


def test_missing_driver_is_found_at_the_start_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for url, package in (("gs://b/x", "gcsfs"), ("s3://b", "s3fs"), ("az://b", "adlfs")):
        with pytest.raises(UsageError, match=f"pip install {package}"):
            check_driver(url)


@pytest.mark.parametrize("url", ["gs:/b", "b", "ftp://b", "gs://", "gs:///", "memory://a/../b"])
def test_url_that_is_no_bucket_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        check_bucket(url)


@pytest.mark.parametrize("url", ["s3://key:secret@b/x", "az://b/x?sig=secret"])
def test_credentials_in_the_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="environment") as error:
        check_bucket(url)
    assert "secret" not in str(error.value)


def test_training_lands_below_its_project_and_name(run: Path) -> None:
    for project, below in (("runs/blood", "blood"), ("", "train"), ("/data/mine", "mine")):
        config = TrainConfig(bucket="memory://b/all/", project=project)
        upload_results(config, run)
        assert fsspec.open(f"memory://b/all/{below}/exp/results.csv").open().read() == b"results.csv"


def test_train_command_copies_its_results(tiny_args: list[str], tmp_path: Path) -> None:
    from starling.cli.train import main

    bucket = tmp_path / "bucket"
    assert main([*tiny_args, "--epochs", "1", "--noplots", "--bucket", f"file://{bucket}"]) == 0
    assert (bucket / "train/exp/results.csv").is_file()
    assert (bucket / "train/exp/weights/best.pt").is_file()


def test_search_copies_its_views_and_its_winner(tiny_args: list[str], tmp_path: Path) -> None:
    from starling.cli.train import main

    bucket = tmp_path / "bucket"
    args = [
        *tiny_args,
        "--epochs",
        "1",
        "--noplots",
        "--evolve",
        "1",
        "--name",
        "s",
        "--bucket",
        f"file://{bucket}",
    ]
    assert main(args) == 0
    for name in ("evolve.csv", "hyp_evolve.yaml", "weights/best.pt"):
        assert (bucket / "evolve/s" / name).is_file()
    assert not list(bucket.rglob("*.lock"))
