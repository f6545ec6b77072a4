"""Every command line that users paste from their guides is understood, and runs.

The lines stand in pasted_commands.txt as the guides print them. What runs is the line itself, in a folder where `train.py`,
`coco.yaml`, `yolov5s.pt` and their like lie as in a user's; only what a small machine lacks is exchanged: the size of
images, the number of epochs and trainings, and GPUs.
"""

from __future__ import annotations

import ast
import csv
import itertools
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from starling import settings
from starling.cli import detect, train, val
from starling.config.shipped import find_config
from starling.config.yaml_reader import read_yaml, write_yaml
from starling.core.settings import detect as detect_settings
from starling.core.settings import hpo as hpo_settings
from starling.core.settings import train as train_settings
from starling.core.settings import val as val_settings
from starling.model.initial_weights import find_initial_weights
from starling.training.training import open_setup, read_hyp
from tests.conftest import PYTHON_PATH, REPOSITORY

LINES = Path(__file__).with_name("pasted_commands.txt")
IMAGE_SIZE = "64"
FOLDER = "/usr/src/app"
"""Where the classic image has its trainer; in the tests it is the folder of the links."""


@dataclass(frozen=True, slots=True)
class Pasted:
    """One line of a guide."""

    line: str
    held_by: tuple[str, ...]

    @property
    def tool(self) -> str:
        """The command that the line runs, here or in a container: train, val, detect, or nothing of ours."""
        found = re.search(r"(\w+)\.py\b", self.line)
        return found[1] if found else ""

    @property
    def arguments(self) -> list[str]:
        """What follows the command's name, without what the shell keeps for itself."""
        after = re.split(r"\w+\.py\b", self.line, maxsplit=1)[1]
        words = shlex.split(re.split(r"[;>]", after)[0])
        return ["1" if word == "$i" else word for word in words if word != "..."]

    @property
    def starter(self) -> list[str] | None:
        """The words between torch's launcher and train.py, G, N and R being 2, 1 and 0; None without a launcher."""
        found = re.search(r"torch\.distributed\.run (.*) train\.py", self.line)
        numbers = {"G": "2", "N": "1", "R": "0"}
        return [numbers.get(word, word) for word in shlex.split(found[1])] if found else None

    @property
    def needs_several(self) -> bool:
        """Whether one training is to run on several devices."""
        return self.starter is not None or bool(re.search(r"--device \d,", self.line))


def read_lines() -> list[Pasted]:
    """Return the lines of the file, each with what is said to hold it."""
    found: list[Pasted] = []
    for line in LINES.read_text().splitlines():
        if line.startswith("    held by "):
            found[-1] = Pasted(found[-1].line, (*found[-1].held_by, line.removeprefix("    held by ")))
        elif line and line[0] not in "#[":
            found.append(Pasted(line, ()))
    return found


PASTED = read_lines()
COMMANDS = [pasted for pasted in PASTED if pasted.tool]
ALONE = [pasted for pasted in COMMANDS if not pasted.held_by and not pasted.needs_several]
SEVERAL = [pasted for pasted in COMMANDS if pasted.needs_several]
TWO = [pasted for pasted in SEVERAL if "--device 0,1,2,3" not in pasted.line]
"""Lines of two processes. Those of four and eight differ in the number only, and would take minutes of a small machine."""
(SEARCH,) = (pasted for pasted in ALONE if "--evolve" in pasted.line)
PARSERS: dict[str, tuple[Callable[[], ArgumentParser], Callable[[list[str]], Any]]] = {
    "train": (train_settings.COMMAND.parser, lambda words: train_settings.parse_args(words).config),
    "val": (val_settings.COMMAND.parser, val_settings.parse_args),
    "detect": (detect_settings.COMMAND.parser, detect_settings.parse_args),
    "hpo": (hpo_settings.COMMAND.parser, hpo_settings.parse_args),
}
MAINS = {"train": train.main, "val": val.main, "detect": detect.main}


def by_line(pasted: Pasted) -> str:
    """Name a test by its line."""
    return pasted.line[:160]


# --- what is understood -----------------------------------------------------------------------------------


def given_values(parser: ArgumentParser, words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag's field and the words that follow it."""
    starts = [place for place, word in enumerate(words) if word.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(words)]):
        flags = [flag for flag in parser._option_string_actions if flag.startswith(words[start])]
        exact = words[start] if words[start] in flags else flags[0]
        yield parser._option_string_actions[exact].dest, words[start + 1 : end]


def as_words(value: Any) -> list[str]:
    """Return a field's value as a command line spells it."""
    if value is True:
        return []
    return [str(item) for item in value] if isinstance(value, tuple) else [str(value)]


@pytest.mark.parametrize("pasted", COMMANDS, ids=by_line)
def test_every_word_of_a_line_arrives_in_the_configuration(pasted: Pasted) -> None:
    parser_of, parse = PARSERS[pasted.tool]
    config = parse(pasted.arguments)
    for field, words in given_values(parser_of(), pasted.arguments):
        value = getattr(config, field)
        bare = {"resume": "latest", "cache": "ram"}.get(field, True)
        assert as_words(value) == (words or as_words(bare)), field


@pytest.mark.parametrize("pasted", [p for p in SEVERAL if p.starter], ids=by_line)
def test_what_stands_before_the_script_is_torchs_own(pasted: Pasted) -> None:
    from torch.distributed.run import get_args_parser

    assert pasted.starter is not None
    parsed = get_args_parser().parse_args([*pasted.starter, "train.py", *pasted.arguments])
    assert parsed.training_script == "train.py"
    assert parsed.training_script_args == pasted.arguments
    assert parsed.nproc_per_node == "2"
    assert parsed.master_port == (1234 if "--master_port" in pasted.line else None)
    assert parsed.master_addr == ("192.168.1.1" if "--master_addr" in pasted.line else "127.0.0.1")


def test_the_guides_short_spellings_mean_the_whole_flags() -> None:
    config = train_settings.parse_args(["--weight", "best.pt", "--freez", "10"]).config
    assert (config.weights, config.freeze) == ("best.pt", (10,))
    assert train_settings.parse_args(["--freez", "0", "2", "4"]).config.freeze == (0, 2, 4)


def test_local_rank_of_an_old_starter_is_taken_and_changes_nothing() -> None:
    assert train_settings.parse_args(["--local_rank", "3"]).config == train_settings.parse_args([]).config


# --- a folder like a user's -------------------------------------------------------------------------------


def narrow(layout: str, path: Path) -> Path:
    """Write a shipped layout with few of its channels and layers."""
    smaller = {"nc": 3, "depth_multiple": 0.1, "width_multiple": 0.03}
    write_yaml(path, {**read_yaml(find_config("layouts", layout)), **smaller})
    return path


@pytest.fixture(scope="module")
def template(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that the lines name: links to the commands, datasets, weights of a training."""
    folder = tmp_path_factory.mktemp("template")
    for name in (
        "coco",
        "coco8",
        "coco_profile",
        "custom",
        "home/user/Data/gbr/dataset",
        "home/user/gbr/dataset",
    ):
        target = folder / f"{name}.yaml"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(tiny_data.read_text().replace("path: .", f"path: {tiny_data.parent}"))
    for name in ("weights", "narrow"):
        (folder / name).mkdir()
    weights = {"yolov5s": ["yolov5s", "yolov5l", "yolov5x", "custom_pretrained", "weights/best"],
               "yolov5s6": ["yolov5s6"]}  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("STARLING_RUNS", str(folder / "made"))
        settings.update({"mlflow": False, "tensorboard": False})
        for layout, names in weights.items():
            words = ["--data", str(tiny_data), "--weights", "", "--cfg", str(narrow(layout, folder / "narrow" / f"{layout}.yaml")),
                     "--img", IMAGE_SIZE, "--epochs", "1", "--device", "cpu", "--noplots", "--name", layout]  # fmt: skip
            assert train.main(words) == 0
            for name in names:
                shutil.copyfile(folder / "made/train" / layout / "weights/best.pt", folder / f"{name}.pt")
    shutil.rmtree(folder / "made")
    for name in ("train", "val", "detect"):
        (folder / f"{name}.py").symlink_to(REPOSITORY / "app" / f"{name}.py")
    (folder / "path").mkdir()
    (folder / "path" / "to").symlink_to(REPOSITORY / "app")
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a copy of that folder, with no variable of ours set: results go to its `runs`, as users have it."""
    copy = shutil.copytree(template, tmp_path / "app", symlinks=True)
    monkeypatch.chdir(copy)
    monkeypatch.delenv("STARLING_RUNS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    settings.update(
        {"mlflow": False, "tensorboard": False}
    )  # it has tests of its own, and importing it takes seconds
    # `python` is this one, and finds what this one finds
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return copy


def small(pasted: Pasted) -> list[str]:
    """Return a line's arguments with what a small machine lacks exchanged, and nothing else."""
    words = [word.replace("/home/user", "home/user") for word in pasted.arguments]
    smaller = {"--img": IMAGE_SIZE, "--imgsz": "100", "--epochs": "1", "--evolve": "1", "--device": "cpu"}
    for place, word in enumerate(words[:-1]):
        if word in smaller:
            count = words[place + 1].count(",") + 1
            words[place + 1] = ",".join([smaller[word]] * count) if word == "--device" else smaller[word]
    lacking = {
        "--device": "cpu",
        "--img": IMAGE_SIZE,
        **({"--epochs": "1"} if pasted.tool == "train" else {}),
    }
    if not words:  # the guide leaves them out
        words = ["--data", "coco.yaml", "--weights", "yolov5s.pt"]
    for flag, value in lacking.items():
        if not any(word.startswith(flag) for word in words):
            words += [flag, value]
    return words


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line as a user's shell does, without a terminal."""
    return subprocess.run(
        ["sh", "-c", line],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def with_arguments(pasted: Pasted, words: list[str]) -> str:
    """Return the line as it is, its arguments exchanged for these."""
    before, script = re.split(r"(\S+\.py)", pasted.line, maxsplit=1)[:2]
    return f"{before}{script} {shlex.join(words)}"


def rows(table: Path) -> int:
    """Return the number of rows of a CSV below its heading."""
    with open(table) as file:
        return len(list(csv.DictReader(file)))


def assert_results(pasted: Pasted, folder: Path) -> None:
    """Look for what the line's command leaves behind, in the folders that its users know."""
    if "--evolve" in pasted.line:
        search = folder / "runs" / ("gbr/search" if "--project gbr" in pasted.line else "evolve/exp")
        assert rows(search / "evolve.csv") == 1
        assert (search / "hyp_evolve.yaml").is_file()
        assert (search / "weights" / "best.pt").is_file()
    elif pasted.tool == "train":
        assert [path.name for path in (folder / "runs/train").iterdir()] == ["exp"]
        assert rows(folder / "runs/train/exp/results.csv") == 1
        assert (folder / "runs/train/exp/weights/best.pt").is_file()
        assert (folder / "runs/train/exp/results.png").is_file()
    elif pasted.tool == "val":
        assert (folder / "runs/val/exp/confusion_matrix.png").is_file()
    else:
        images = {path.name for path in (REPOSITORY / "datasets/bccd-mini/images/val").iterdir()}
        outputs = {path.name for path in (folder / "runs/detect/exp").iterdir()}
        assert outputs == {*images, "outputs.json"}


# --- what runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pasted", [p for p in ALONE if p.line.startswith("python path/to/")], ids=by_line)
def test_a_line_runs_from_another_folder_by_the_commands_path(pasted: Pasted, folder: Path) -> None:
    ended = shell(with_arguments(pasted, small(pasted)))
    assert ended.returncode == 0, ended.stderr
    assert_results(pasted, folder)


@pytest.mark.parametrize(
    "pasted", [p for p in ALONE if re.match(r"python \w+\.py", p.line) and p != SEARCH], ids=by_line
)
def test_a_line_runs_beside_the_command(pasted: Pasted, folder: Path) -> None:
    assert MAINS[pasted.tool](small(pasted)) == 0
    assert_results(pasted, folder)


def test_default_results_count_on_from_exp(folder: Path) -> None:
    words = [
        "--data",
        "coco.yaml",
        "--weights",
        "yolov5s",
        "--img",
        IMAGE_SIZE,
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    for _ in range(3):
        assert train.main([*words, "--noplots", "--noval"]) == 0
    assert {path.name for path in (folder / "runs/train").iterdir()} == {"exp", "exp2", "exp3"}


def test_a_search_rounds_a_size_off_the_stride_up_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(small(SEARCH)) == 0
    assert "--imgsz 100 is rounded up to 128, a multiple of the layout's stride 64" in capsys.readouterr().out
    assert_results(SEARCH, folder)


def test_the_guides_3000_is_rounded_up_to_3008_and_said(folder: Path, said: list[str]) -> None:
    words = [word.replace("/home/user", "home/user") for word in SEARCH.arguments]
    words[words.index("--device") + 1] = "cpu"
    config = train_settings.parse_args(words).config
    assert config.imgsz == 3000
    setup = open_setup(config, find_initial_weights(config.weights, config.cfg), read_hyp(config))
    assert "--imgsz 3000 is rounded up to 3008, a multiple of the layout's stride 64" in said
    assert setup.image_size == setup.data.train_images.image_size == 3008


def test_the_log_of_a_training_without_a_terminal_has_whole_lines(folder: Path) -> None:
    (nohup,) = (pasted for pasted in ALONE if pasted.line.startswith("nohup"))
    words = [*small(nohup), "--epochs", "3"]
    line = nohup.line.replace("...", shlex.join(words))
    ended = shell(line, TERM="xterm-256color", COLUMNS="200")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    assert [said for said in ended.stderr.splitlines() if not said.startswith("nohup: ")] == []
    log = (folder / "training.log").read_bytes().decode()
    assert log.endswith("\n")
    assert not [letter for letter in log if letter != "\n" and not letter.isprintable()], (
        "\\r, or an escape code"
    )
    for epoch in (1, 2, 3):
        assert len(re.findall(rf"^epoch {epoch}/3 ", log, re.MULTILINE)) == 1
    assert "results in " in log.splitlines()[-1]


def test_the_trainer_of_the_docker_loop_starts_a_search_and_joins_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (loop,) = (pasted for pasted in COMMANDS if pasted.line.startswith("for i in"))
    words = small(loop)
    assert f"{FOLDER}/data/hyps/hyp.finetune.yaml" in words
    for trainings in ("1", "2"):  # the second container of the loop finds the first one's search
        assert train.main([*words, "--evolve", trainings]) == 0
        assert rows(folder / "runs/gbr/search/evolve.csv") == int(trainings)
    assert [path.name for path in (folder / "runs/gbr").iterdir()] == ["search"]


# --- several devices --------------------------------------------------------------------------------------


def free_port() -> str:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("pasted", TWO, ids=by_line)
def test_a_line_trains_one_model_on_several_devices(pasted: Pasted, folder: Path) -> None:
    shutil.copyfile("narrow/yolov5s.yaml", "yolov5s.yaml")
    line = with_arguments(pasted, small(pasted))
    if pasted.starter is not None:
        here = [{"192.168.1.1": "127.0.0.1", "1234": free_port()}.get(word, word) for word in pasted.starter]
        line = f"python -m torch.distributed.run {shlex.join(here)} train.py {shlex.join(small(pasted))}"
    ended = shell(line)
    if "--sync-bn" in pasted.line:  # the only thing a machine without GPUs cannot stand in for
        assert ended.returncode != 0
        assert "leave it out on the CPU" in ended.stderr
        return
    assert ended.returncode == 0, ended.stderr
    assert "epoch 1/1" in ended.stdout
    assert_results(pasted, folder)


# --- MLflow's lines, as this project has them -------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"), [("mlflow=True", True), ("mlflow=False", False), ("reset", True)]
)
def test_settings_change_on_the_command_line_and_in_python(word: str, expected: bool, folder: Path) -> None:
    before = {"mlflow": not expected}
    settings.update(before)
    ended = shell(f"starling settings {word}", PYTHONPATH=PYTHON_PATH)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"mlflow={expected}\n" in ended.stdout
    assert settings.read().mlflow is expected
    settings.update(before)
    assert settings.read().mlflow is not expected
    changed = settings.reset() if word == "reset" else settings.update({"mlflow": expected})
    assert changed.mlflow is settings.read().mlflow is expected


# --- Docker's own lines -----------------------------------------------------------------------------------


def test_every_line_that_is_not_run_here_names_tests_that_exist() -> None:
    for pasted in PASTED:
        assert pasted.held_by or pasted in ALONE or pasted in SEVERAL, pasted.line
        for name in pasted.held_by:
            file, _, test = name.partition("::")
            functions = ast.walk(ast.parse((REPOSITORY / file).read_text()))
            assert test in {node.name for node in functions if isinstance(node, ast.FunctionDef)}, name


def test_the_build_line_needs_no_option_and_finds_all_it_copies() -> None:
    (build,) = (pasted.line for pasted in PASTED if pasted.line.startswith("docker build"))
    assert build.split()[-1] == "."
    steps = re.sub(r"\\\n", " ", (REPOSITORY / "Dockerfile").read_text()).splitlines()
    assert len([step for step in steps if step.startswith("FROM ")]) == 1, "the last stage is what is built"
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)", "\n".join(steps), re.MULTILINE))
    (base,) = (step.removeprefix("FROM ") for step in steps if step.startswith("FROM "))
    assert defaults.get(base.strip("${}")), f"{base} has no default"
    sources = [word for step in steps if step.startswith("COPY ") for word in step.split()[1:-1]]
    assert len(sources) > 3
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
