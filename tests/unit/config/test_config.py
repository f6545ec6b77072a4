"""Configuration is strict: what cannot work is said in one message, and what users paste is understood."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.config.hyp import Hyp
from starling.config.shipped import SHIPPED, find_config
from starling.config.yaml_reader import read_yaml, write_yaml
from starling.core.errors import ConfigError, DataError, StarlingError, UsageError
from starling.core.plain_yaml import MOST_BYTES
from starling.core.settings.train import TrainConfig, parse_args


def yaml_file(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "file.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: !!python/object/apply:os.system ['true']", "tag"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: 1\na: 2", "file.yaml:2: the key 'a' appears twice"),
        ("- 1\n- 2", "key: value"),
        ("a: [1, 2", "file.yaml:"),
        (b"a: \xff\xfe", "UTF-8"),
        ("1: one", "must be text"),
        ("[" * 200, "nested"),
        ("a: 1\n" + "# long\n" * (MOST_BYTES // 4), "larger than"),
        ("? [a, b]\n: 1", "key"),
    ],
)
def test_yaml_that_is_not_plain_data_is_refused_by_name_and_line(
    tmp_path: Path, content: str | bytes, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        read_yaml(yaml_file(tmp_path, content))
    assert words in str(caught.value)
    assert "file.yaml" in str(caught.value)


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    started = time.monotonic()
    with pytest.raises(UsageError):
        read_yaml(yaml_file(tmp_path, bomb))
    assert time.monotonic() - started < 1


def test_yaml_words_and_numbers_mean_what_people_mean(tmp_path: Path) -> None:
    text = "names: [no, yes, on, y]\nrate: 1e-3\nwhole: 3\nflag: true\nnothing: ~\nlow: -.5\n"
    assert read_yaml(yaml_file(tmp_path, text)) == {
        "names": ["no", "yes", "on", "y"], "rate": 0.001, "whole": 3, "flag": True, "nothing": None, "low": -0.5,
    }  # fmt: skip


@given(text=st.text(max_size=200))
def test_any_text_is_a_mapping_or_our_own_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "file.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    message = ""
    try:
        value: object = read_yaml(path)
    except StarlingError as error:
        value, message = None, str(error)
    assert isinstance(value, dict) or str(path) in message


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    hyp = Hyp(lr0=1e-5, anchors=3.0)
    write_yaml(tmp_path / "hyp.yaml", hyp.as_dict(), comment="two\nlines")
    assert Hyp.from_mapping(read_yaml(tmp_path / "hyp.yaml")) == hyp
    assert (tmp_path / "hyp.yaml").read_text().startswith("# two\n# lines\n")


@pytest.mark.parametrize("path", sorted((SHIPPED / "hyps").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_hyp_file_is_whole(path: Path) -> None:
    values = read_yaml(path)
    hyp = Hyp.from_mapping(values, path.name)
    assert {**hyp.as_dict(), "label_smoothing": 0.0} == {**values, "label_smoothing": 0.0}
    assert len(values) == (28 if hyp.dfl is None else 24)


def test_the_defaults_are_those_of_the_low_file() -> None:
    assert Hyp.from_mapping(read_yaml(find_config("hyps", "hyp.scratch-low.yaml"))) == Hyp()


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"momentun": 0.9}, "did you mean 'momentum'"),
        ({"lr0": "fast"}, "must be a number"),
        ({"lr0": True}, "must be a number"),
        ({"lr0": -1}, "0 or above"),
        ({"lr0": float("nan")}, "finite"),
        ({"mosaic": 2}, "between 0 and 1"),
        ({"anchor_t": 1}, "above 1"),
    ],
)
def test_a_hyperparameter_that_cannot_work_is_refused(mapping: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Hyp.from_mapping(mapping, "mine.yaml")


@pytest.mark.parametrize(
    ("kind", "name", "file"),
    [
        ("hyps", "hyp.finetune.yaml", "hyp.finetune.yaml"),
        ("hyps", "data/hyps/hyp.finetune.yaml", "hyp.finetune.yaml"),
        ("hyps", "/usr/src/app/data/hyps/hyp.finetune.yaml", "hyp.finetune.yaml"),
        ("layouts", "yolov5n.yaml", "yolov5n.yaml"),
        ("layouts", "models/yolov5n.yaml", "yolov5n.yaml"),
        ("layouts", "yolov5n6", None),
        ("datasets", "bccd.yaml", "bccd.yaml"),
    ],
)
def test_names_that_guides_use_mean_the_shipped_files(kind: str, name: str, file: str | None) -> None:
    if file is None:  # a bare name with no ending is completed only where it has none
        assert find_config(kind, name).name == f"{name}.yaml"  # type: ignore[arg-type]
    else:
        assert find_config(kind, name) == SHIPPED / kind / file  # type: ignore[arg-type]


def test_a_file_of_ones_own_comes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yolov5n.yaml").write_text("nc: 1\n")
    assert find_config("layouts", "yolov5n.yaml").resolve() == tmp_path / "yolov5n.yaml"


def test_a_mistyped_folder_is_not_silently_a_shipped_file() -> None:
    with pytest.raises(UsageError, match=r"hyp\.finetune\.yaml"):
        find_config("hyps", "/home/me/hyps/hyp.finetune.yaml")
    with pytest.raises(DataError):
        find_config("datasets", "mine/bccd.yaml")


def test_flags_have_their_classic_names_aliases_and_prefixes() -> None:
    line = "--img 320 --batch 8 --weight x.pt --freez 10 --cache --evolve --resume --single --optim AdamW"
    command = parse_args(line.split())
    config = command.config
    assert (config.imgsz, config.batch_size, config.weights, config.freeze) == (320, 8, "x.pt", (10,))
    assert (config.cache, config.evolve, config.resume) == ("ram", 300, "latest")
    assert config.single_cls
    assert config.optimizer == "AdamW"
    assert "epochs" not in command.given
    assert {"imgsz", "batch_size", "freeze"} <= command.given


def test_a_command_without_flags_is_the_configurations_defaults() -> None:
    command = parse_args([])
    assert command.config == TrainConfig()
    assert command.given == frozenset()


def test_a_configuration_survives_its_plain_form() -> None:
    config = TrainConfig(freeze=(0, 3), weights="", cfg="yolov5n.yaml", evolve=5)
    assert TrainConfig.from_mapping(config.as_dict()) == config


@pytest.mark.parametrize(
    "values",
    [{"epochs": 0}, {"batch_size": -2}, {"imgsz": 8}, {"evolve": -1}, {"workers": -1}, {"patience": -1},
     {"label_smoothing": 1.0}, {"freeze": (-1,)}],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_its_flag(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"--\w"):
        TrainConfig(**values)  # type: ignore[arg-type]
