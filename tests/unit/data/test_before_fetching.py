"""What is wrong on this machine is found before anything is fetched; a training that has nothing to train is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from starling.cli import detect, export, train, val
from starling.config.yaml_reader import read_yaml
from starling.core.errors import UsageError
from starling.device import OWN_LAUNCH, asked_threads
from starling.model import initial_weights as start
from starling.model.initial_weights import InitialWeights, check_freeze, frozen_layers
from tests.conftest import MINI_SET, REPOSITORY, TINY_LAYOUT

IMAGE = min((MINI_SET / "images" / "val").glob("*.jpg"))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Return the names of what is fetched, which here is nothing but noted."""
    names: list[str] = []

    def note(name: str, progress: object) -> Path:
        names.append(name)
        raise AssertionError(f"{name} was fetched")

    monkeypatch.setattr(start, "official_weights", note)
    monkeypatch.chdir(tmp_path)
    return names


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--data", "nowhere.yaml"], 3, "nowhere.yaml"),
        (["--data", "empty.yaml"], 3, "no images there"),
        (["--data", "wrong.yaml"], 2, "wrong.yaml"),
        (["--data", str(MINI_SET / "bccd.yaml"), "--freeze", "25"], 2, "the layout has 25 layers"),
        (["--data", str(MINI_SET / "bccd.yaml"), "--device", "7"], 2, "--device 7"),
        (["--data", str(MINI_SET / "bccd.yaml"), "--cfg", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["--data", str(MINI_SET / "bccd.yaml"), "--hooks", "nowhere.py"], 2, "nowhere.py"),
        (["--data", "nowhere.yaml", "--evolve", "2"], 3, "nowhere.yaml"),
    ],
)
def test_a_training_finds_what_is_wrong_here_before_it_fetches_weights(
    words: list[str],
    code: int,
    said: str,
    fetched: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "empty.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [a]\n")
    (tmp_path / "wrong.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [a, b]\nnc: 7\n")
    assert train.main(["--weights", "yolov5s.pt", "--epochs", "1", *words]) == code
    assert said in capsys.readouterr().err
    assert fetched == []


def test_validation_detection_and_export_look_here_before_they_fetch(
    fetched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ["--weights", "yolov5s.pt", "--device", "cpu"]
    assert val.main([*weights, "--data", "nowhere.yaml"]) == 3
    assert detect.main([*weights, "--source", str(IMAGE), "--data", "nowhere.yaml"]) == 3
    assert detect.main([*weights, "--source", "nowhere.jpg"]) == 3
    assert export.main([*weights, "--half"]) == 2
    assert val.main(["--weights", "nowhere.pt", "--data", "clearml://0123456789abcdef0123456789abcdef"]) == 4
    assert "nowhere.pt" in capsys.readouterr().err
    assert fetched == []


@pytest.mark.parametrize(
    "frozen", [(24,), (11,), (99,), tuple(range(11)), tuple(range(40)), (10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0)]
)
def test_freezing_everything_is_refused_with_the_number_of_layers(frozen: tuple[int, ...]) -> None:
    detector = InitialWeights(read_yaml(TINY_LAYOUT), None).build(("a",), None)
    with pytest.raises(UsageError, match=r"nothing is left to train, the layout has 11 layers, 0 to 10"):
        check_freeze(detector, frozen)


def test_freezing_every_layer_that_has_parameters_is_freezing_everything() -> None:
    detector = InitialWeights(read_yaml(TINY_LAYOUT), None).build(("a",), None)
    with_parameters = tuple(index for index, layer in enumerate(detector.model) if list(layer.parameters()))
    assert len(with_parameters) < 11
    with pytest.raises(UsageError, match="nothing is left"):
        check_freeze(detector, with_parameters)
    check_freeze(detector, with_parameters[:-1])
    check_freeze(detector, (10,))
    check_freeze(detector, (0,))
    assert frozen_layers(detector, (3, 40)) == [3]


@pytest.mark.parametrize("more", [[], ["--evolve", "2"]])
def test_a_training_of_nothing_ends_with_a_message(
    tiny_args: list[str], more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_args, "--freeze", "24", *more]) == 2
    assert "--freeze 24: nothing is left to train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": " 4,2 "}, 4),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 1),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, None),
        ({"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, 2),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}, 1),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", OWN_LAUNCH: "1"}, 1),
    ],
)
def test_threads_are_those_of_omp_num_threads_unless_torchrun_set_it(
    environment: dict[str, str], threads: int | None, said: list[str]
) -> None:
    assert asked_threads(environment) == threads
    assert said == []


@pytest.mark.parametrize("given", ["0", "-1", "many", "1.5", "9" * 5000, "²"])
def test_a_number_of_threads_that_is_none_is_said_and_not_obeyed(given: str, said: list[str]) -> None:
    assert asked_threads({"OMP_NUM_THREADS": given}) is None
    assert len(said) == 1
    assert len(said[0]) < 200


def test_a_process_takes_as_many_threads_as_omp_num_threads_says() -> None:
    code = (
        "import cv2, torch; from starling.device import select_compute; "
        "print(select_compute('cpu', 'off').describe(), torch.get_num_threads(), cv2.getNumThreads())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "CPU, 3 threads, float32 3 3"


@pytest.mark.parametrize("place", ["../x", "link", "file", "shut/deep"])
@pytest.mark.parametrize("command", ["train", "search", "val", "task study", "detect"])
def test_a_project_that_cannot_be_is_refused_before_any_data_is_read(
    command: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STARLING_RUNS", str(tmp_path / "runs"))
    (tmp_path / "runs/shut").mkdir(parents=True)
    (tmp_path / "runs/link").symlink_to(tmp_path)
    (tmp_path / "runs/file").touch()
    (tmp_path / "runs/shut").chmod(0o500)
    if place.startswith("shut") and os.geteuid() == 0:
        pytest.skip("no mode shuts root out")
    # Read later than the project: each of these is a message of its own, which does not come.
    missing = ["--data", "nowhere.yaml"]
    words = {
        "train": (train.main, [*missing, "--weights", "", "--cfg", str(TINY_LAYOUT)]),
        "search": (train.main, [*missing, "--weights", "", "--cfg", str(TINY_LAYOUT), "--evolve", "2"]),
        "val": (val.main, [*missing, "--weights", "nowhere.pt"]),
        "task study": (val.main, [*missing, "--weights", "nowhere.pt", "--task", "study"]),
        "detect": (detect.main, ["--source", "nowhere.jpg", "--weights", "nowhere.pt"]),
    }
    main, given = words[command]
    assert main([*given, "--project", place]) == 2
    said = capsys.readouterr().err
    assert "--project" in said
    assert "nowhere" not in said
    assert not (tmp_path / "x").exists()
