"""What is searched: genes and settings as a YAML says them, within limits, and errors that name file and key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution

from starling.cli import train
from starling.config.hyp import Hyp
from starling.config.shipped import find_config
from starling.config.yaml_reader import read_yaml
from starling.core.errors import UsageError
from starling.core.settings.train import TrainConfig
from starling.search.space import Gene, SettingGene, Space, settings_flags, split_values
from starling.search.space_file import SETTINGS, parse_space, read_space
from tests.conftest import REPOSITORY

GENES: tuple[Gene, ...] = (
    Gene("lr0", 1, 1e-5, 0.1, log=True),
    Gene("lrf", 1, 0.01, 1.0, log=True),
    Gene("momentum", 0.3, 0.6, 0.98),
    Gene("weight_decay", 1, 0.0, 0.001),
    Gene("warmup_epochs", 1, 0.0, 5.0),
    Gene("warmup_momentum", 1, 0.0, 0.95),
    Gene("warmup_bias_lr", 1, 0.0, 0.2),
    Gene("box", 1, 0.02, 0.2, log=True),
    Gene("cls", 1, 0.2, 4.0, log=True),
    Gene("cls_pw", 1, 0.5, 2.0, log=True),
    Gene("obj", 1, 0.2, 4.0, log=True),
    Gene("obj_pw", 1, 0.5, 2.0, log=True),
    Gene("iou_t", 0, 0.1, 0.7),
    Gene("anchor_t", 1, 2.0, 8.0),
    Gene("anchors", 2, 2.0, 10.0),
    Gene("fl_gamma", 0, 0.0, 2.0),
    Gene("hsv_h", 1, 0.0, 0.1),
    Gene("hsv_s", 1, 0.0, 0.9),
    Gene("hsv_v", 1, 0.0, 0.9),
    Gene("degrees", 1, 0.0, 45.0),
    Gene("translate", 1, 0.0, 0.9),
    Gene("scale", 1, 0.0, 0.9),
    Gene("shear", 1, 0.0, 10.0),
    Gene("perspective", 0, 0.0, 0.001),
    Gene("flipud", 1, 0.0, 1.0),
    Gene("fliplr", 0, 0.0, 1.0),
    Gene("mosaic", 1, 0.0, 1.0),
    Gene("mixup", 1, 0.0, 1.0),
    Gene("copy_paste", 1, 0.0, 1.0),
)
CONFIG = TrainConfig(evolve=1)
LR0 = {"lower": 0.001, "upper": 0.1, "log": True}


def parse(mapping: dict[str, Any], **config: Any) -> Space:
    """Read a space from a YAML's content."""
    return parse_space(mapping, "mine.yaml", TrainConfig(evolve=1, **config))


def test_the_shipped_space_is_the_classic_29_genes() -> None:
    assert parse_space(read_yaml(find_config("spaces", "classic")), "classic.yaml", CONFIG) == Space(GENES)
    assert read_space(CONFIG) == (Space(GENES), {})


def test_a_gene_that_is_left_out_is_not_searched_and_one_without_gain_has_the_classic_one() -> None:
    assert parse({"lr0": LR0}).genes == (Gene("lr0", 1, 0.001, 0.1, log=True),)


def test_order_in_the_file_does_not_matter() -> None:
    one = {
        "lr0": LR0,
        "momentum": {"lower": 0.8, "upper": 0.9},
        "optimizer": ["SGD", "Adam"],
        "imgsz": [64, 96],
    }
    assert parse(one) == parse(dict(reversed(one.items())))
    assert parse(one).names == ("lr0", "momentum", "imgsz", "optimizer")


def test_choices_of_sizes_are_sorted_and_a_range_of_batches_is_its_powers_of_2() -> None:
    space = parse({"batch_size": {"lower": 6, "upper": 64}, "imgsz": [640, 320]})
    assert space.settings == (SettingGene("batch_size", (8, 16, 32, 64)), SettingGene("imgsz", (320, 640)))


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"momentun": LR0}, "mine.yaml: momentun: neither a hyperparameter .*did you mean 'momentum'"),
        ({"bach_size": [8, 16]}, "did you mean 'batch_size'"),
        ({}, "names nothing to search"),
        ({"lr0": 0.1}, "mine.yaml: lr0: 0.1 gives no limits; give lr0: {lower"),
        ({"lr0": {"lower": 0.1}}, "lr0.upper=None: must be a finite number"),
        ({"lr0": {**LR0, "uper": 1}}, "unknown key 'uper'.*did you mean 'upper'"),
        ({"lr0": {"lower": 0.1, "upper": 0.01}}, "lower 0.1 must be below upper 0.01"),
        ({"lr0": {"lower": 0.1, "upper": 0.1}}, "lower 0.1 must be below upper 0.1.*leave it out"),
        ({"lr0": {"lower": "small", "upper": 0.1}}, "lr0.lower='small': must be a finite number"),
        ({"lr0": {"lower": True, "upper": 2}}, "lr0.lower=True: must be a finite number"),
        ({"lr0": {"lower": 0.1, "upper": float("inf")}}, "lr0.upper=inf: must be a finite number"),
        ({"lr0": {"lower": 0.1, "upper": 10**400}}, "must be a finite number"),
        ({"lr0": {"lower": 0, "upper": 0.1, "log": True}}, "a log scale cannot contain 0; raise lower"),
        ({"lr0": {**LR0, "log": "yes"}}, "lr0.log='yes': must be true or false"),
        ({"lr0": {**LR0, "gain": -1}}, "gain=-1: must be 0 or above"),
        ({"lr0": {"lower": -0.1, "upper": 0.1}}, "lr0=-0.1: must be a finite number, 0 or above"),
        ({"mosaic": {"lower": 0, "upper": 2}}, "mine.yaml: mosaic: mosaic=2.0: must be between 0 and 1"),
        ({"optimizer": []}, r"optimizer: \[\] gives no choices; give a list such as optimizer: \[SGD, AdamW\]"),
        ({"optimizer": "SGD"}, "optimizer: 'SGD' gives no choices"),
        ({"optimizer": ["SGD", "adamW"]}, "'adamW' is none of SGD, Adam, AdamW.*did you mean 'AdamW'"),
        ({"optimizer": ["SGD", 3]}, "optimizer: 3 is not a name"),
        ({"optimizer": ["SGD", "SGD"]}, "'SGD' stands twice"),
        ({"optimizer": ["SGD"]}, "a single choice cannot be searched; give --optimizer SGD"),
        ({"batch_size": [8, 0]}, "batch_size: 0 cannot be trained with: --batch-size=0: must be at least 1"),
        ({"batch_size": [8, -1]}, "-1 is no size"),
        ({"batch_size": [8, 16.5]}, "16.5 is not a whole number"),
        ({"batch_size": {"lower": 8, "uppr": 64}}, "has the keys lower, uppr; give a list"),
        ({"batch_size": {"lower": 64, "upper": 8}}, "lower 64 must be at least 1 and below upper 8"),
        ({"batch_size": {"lower": 9, "upper": 15}}, "no power of 2 lies from 9 to 15"),
        ({"imgsz": [16, 64]}, "imgsz: 16 cannot be trained with: --imgsz=16: must be at least 32"),
        ({"imgsz": {"lower": 64, "upper": 128}}, "gives no choices"),
        ({"imgsz": list(range(32, 3200, 32))}, "99 choices; a search can tell apart 64"),
        ({"cfg": ["yolov5n.yaml", "yolov5q.yaml"]}, "mine.yaml: cfg: --cfg yolov5q.yaml: no such file"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_work_is_refused_with_file_key_and_remedy(
    mapping: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse(mapping)
    assert str(caught.value).startswith("mine.yaml")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_choices_are_tried_in_the_training_that_was_asked_for() -> None:
    assert parse({"batch_size": [6, 8]}).settings
    with pytest.raises(UsageError, match="multiple of 4 with --quad"):
        parse({"batch_size": [6, 8]}, quad=True)


def write(folder: Path, text: str) -> str:
    """Write a space and return its path."""
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


def test_a_search_starts_from_the_command_lines_own_settings(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: [SGD, AdamW]\nbatch_size: [8, 16]\ncfg: [yolov5n, yolov5s.yaml]\n")
    config = TrainConfig(evolve=1, space=path, cfg="models/yolov5n.yaml", optimizer="AdamW")
    assert read_space(config)[1] == {"batch_size": 16, "optimizer": "AdamW", "cfg": "yolov5n"}


def test_a_layout_of_ones_own_is_named_from_the_folder_of_the_space(tmp_path: Path) -> None:
    layout = tmp_path / "layouts" / "mine.yaml"
    layout.parent.mkdir()
    layout.write_text("backbone: []\n")
    path = write(tmp_path, "cfg: [yolov5n.yaml, layouts/mine.yaml]\n")
    space, start = read_space(TrainConfig(evolve=1, space=path, cfg=str(layout)))
    assert space.settings == (SettingGene("cfg", ("yolov5n.yaml", str(layout.resolve()))),)
    assert start == {"cfg": str(layout.resolve())}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 64}, "batch_size: the search starts from --batch-size 64, which is none of its choices 8, 16"),
        ({"batch_size": -1}, "--batch-size -1, which is none of its choices"),
        ({"cfg": ""}, "cfg: the search starts from --cfg '', which is none of its choices yolov5n, yolov5s"),
        ({"cfg": "yolov5m.yaml"}, "give --cfg one of them, or add it there"),
    ],
)  # fmt: skip
def test_a_search_that_starts_from_none_of_the_choices_is_refused(
    tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    path = write(tmp_path, "batch_size: [8, 16]\ncfg: [yolov5n, yolov5s]\n")
    with pytest.raises(UsageError, match=words):
        read_space(TrainConfig(**{"evolve": 1, "space": path, "cfg": "yolov5n", **given}))


def test_a_bad_space_is_exit_2_with_one_message(
    tmp_path: Path, tiny_args: list[str], capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    path = write(tmp_path, "lr0: {lower: 0.1, upper: 0.01}\n")
    assert train.main([*tiny_args, "--evolve", "1", "--space", path]) == 2
    error = capsys.readouterr().err.strip()
    assert error == (
        f"error: {path}: lr0: lower 0.1 must be below upper 0.01; "
        "give lr0: {lower: …, upper: …}, or leave it out to keep the hyp's value"
    )
    assert not runs.exists(), "nothing is begun before the space is understood"


@pytest.mark.parametrize(
    "flag", [["--sampler", "classic"], ["--space", "mine.yaml"], ["--prune"], ["--finalists", "4"]]
)
def test_what_only_a_search_knows_is_refused_without_one(
    flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(flag) == 2
    assert f"{flag[0]}: belongs to a search; add --evolve N" in capsys.readouterr().err


def test_a_layout_that_cannot_be_built_is_found_before_anything_starts(
    tmp_path: Path, tiny_args: list[str], capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    (tmp_path / "broken.yaml").write_text("backbone: 3\n")
    tiny = tiny_args[tiny_args.index("--cfg") + 1]
    path = write(tmp_path, f"cfg: [{tiny}, {tmp_path / 'broken.yaml'}]\n")
    assert train.main([*tiny_args, "--evolve", "1", "--space", path]) == 2
    assert f"{path}: cfg: {tmp_path / 'broken.yaml'}" in capsys.readouterr().err
    assert not runs.exists()


def test_gene_of_the_hyp_at_0_is_searched_on_a_linear_scale() -> None:
    space = Space(GENES).starting_from(Hyp(lrf=0.0).as_dict())
    scales = {gene.name: gene.log for gene in space.genes}
    assert (scales["lr0"], scales["lrf"]) == (True, False)
    space.distributions(Hyp(lrf=0.0).as_dict())


def test_space_that_the_hyp_has_nothing_of_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to search"):
        parse({"anchors": {"lower": 3, "upper": 9}}).starting_from(Hyp().as_dict())


def test_values_come_apart_into_hyp_and_settings() -> None:
    values = {"lr0": 0.1, "imgsz": 64, "optimizer": "Adam", "batch_size": 4, "cfg": "a.yaml"}
    limits = {
        name: FloatDistribution(0, 1) if name == "lr0" else CategoricalDistribution([value])
        for name, value in values.items()
    }
    hyp, settings = split_values(values, limits)
    assert hyp == {"lr0": 0.1}
    assert settings_flags(settings) == "--imgsz 64 --optimizer Adam --batch-size 4 --cfg a.yaml"
    assert set(settings) == set(SETTINGS)


GENE = st.builds(
    lambda low, width, log, gain: Gene("lr0", gain, low, low + width, log and low > 0),
    st.floats(0, 1e3), st.floats(1e-3, 1e3), st.booleans(), st.floats(0, 3),
)  # fmt: skip


@given(gene=GENE, place=st.floats(-0.5, 1.5))
def test_every_place_of_a_gene_is_a_value_inside_and_back(gene: Gene, place: float) -> None:
    value = gene.at(place)
    assert gene.lower <= value <= gene.upper
    near = max(abs(gene.lower), abs(gene.upper)) * 1e-4
    assert gene.at(gene.position(value)) == pytest.approx(value, abs=near)
    assert gene.at(0) == gene.lower
    assert gene.at(1) == gene.upper


@given(count=st.integers(2, 64), place=st.floats(-0.5, 1.5))
def test_every_place_of_a_setting_is_one_of_its_choices(count: int, place: float) -> None:
    setting = SettingGene("batch_size", tuple(range(count)))
    assert setting.at(place) in setting.choices
    assert [setting.at(setting.position(choice)) for choice in setting.choices] == list(setting.choices)


@given(gene=GENE, value=st.floats(-1e3, 3e3))
def test_a_classic_mutant_lies_inside_limits_of_more_than_five_decimals_too(gene: Gene, value: float) -> None:
    assert gene.lower <= gene.clamp(value) <= gene.upper


def test_parsing_a_command_line_imports_no_optuna() -> None:
    line = "import sys; from starling.core.settings.train import parse_args; parse_args(['--evolve', '--sampler', 'gp'])"
    check = "; sys.exit(any(name in sys.modules for name in ('optuna', 'scipy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", line + check], cwd=REPOSITORY).returncode == 0
