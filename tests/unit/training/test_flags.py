"""What a flag changes, for those flags whose effect no other file tests; tests/docs/flags.toml lists all of them."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch

from starling import device, settings
from starling.cli import detect, export, train, val
from starling.config.yaml_reader import read_yaml
from starling.core.errors import StarlingError, UsageError
from starling.core.settings import detect as detect_settings
from starling.core.settings import export as export_settings
from starling.core.settings import train as train_settings
from starling.core.settings import val as val_settings
from starling.data.loader.loader import ValLoader
from starling.device import Compute, select_compute
from starling.evaluation import evaluation
from starling.export import exporter
from starling.model.checkpoint import load_checkpoint
from starling.training import checkpoint as saving
from starling.training.setup.data import load_data
from starling.training.trainer import Trainer, TrainResult
from tests.conftest import CELL_DETECTOR, MINI_SET, TINY_LAYOUT

WEIGHTS = str(CELL_DETECTOR)
IMAGE = min((MINI_SET / "images" / "val").glob("*.jpg"))
MAINS = {"train": train.main, "val": val.main, "detect": detect.main, "export": export.main}

pytestmark = pytest.mark.usefixtures("no_tracking")


@pytest.fixture
def no_tracking(runs: Path) -> None:
    """Keep the bridge out: it has tests of its own, and importing MLflow takes seconds."""
    settings.update({"mlflow": False, "tensorboard": False})


@pytest.fixture
def quick_args(tiny_args: list[str]) -> list[str]:
    """Return the flags of a training of one epoch that draws nothing."""
    return [*tiny_args, "--epochs", "1", "--noplots"]


@pytest.fixture
def val_args(tiny_data: Path) -> list[str]:
    """Return the flags of a validation of real weights on four images."""
    return ["--weights", WEIGHTS, "--data", str(tiny_data), "--img", "96", "--device", "cpu", "--json"]


DETECT_ARGS = [
    "--weights",
    WEIGHTS,
    "--source",
    str(IMAGE),
    "--img",
    "96",
    "--conf-thres",
    "0.05",
    "--device",
    "cpu",
]


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Trainer]:
    """Return what prepares the training of a command line, and stops before its first iteration."""

    def prepared(words: list[str]) -> Trainer:
        kept: list[Trainer] = []

        def fit(self: Trainer) -> TrainResult:
            kept.append(self)
            raise StarlingError("prepared")

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "fit", fit)
            assert train.main(words) == 1
        return kept[0]

    return prepared


def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch tell of two GPUs, which are good for being chosen only."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *given: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: None)


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "results.csv") as file:
        return list(csv.DictReader(file))


def model_of(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights that a training ended with, not averaged."""
    return load_checkpoint(run / "weights" / "last.pt")["model"]


# --- train: what it is made of ----------------------------------------------------------------------------


def test_a_training_is_of_the_layout_data_and_hyperparameters_named(
    quick_args: list[str], tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, hyp = tmp_path / "mine.yaml", tmp_path / "hyp.yaml"
    layout.write_text(TINY_LAYOUT.read_text().replace("width_multiple: 0.06", "width_multiple: 0.1"))
    hyp.write_text("lr0: 0.003\n")
    assert train.main([*quick_args, "--cfg", str(layout), "--hyp", str(hyp)]) == 0
    content = load_checkpoint(runs / "train" / "exp" / "weights" / "last.pt")
    assert content["layout"]["width_multiple"] == 0.1
    assert content["names"] == ["RBC", "WBC", "Platelets"]
    assert read_yaml(runs / "train" / "exp" / "hyp.yaml")["lr0"] == 0.003
    assert "train: 8 images" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "frozen"), [(["2"], {0, 1}), (["0", "3"], {0, 3})])
def test_freeze_leaves_the_first_layers_or_the_listed_ones_as_they_were(
    quick_args: list[str], runs: Path, words: list[str], frozen: set[int]
) -> None:
    assert train.main([*quick_args, "--name", "start"]) == 0
    start = runs / "train" / "start" / "weights" / "best.pt"
    tuned = [*quick_args, "--weights", str(start), "--cfg", "", "--noautoanchor", "--name", "tuned"]
    assert train.main([*tuned, "--freeze", *words]) == 0
    before, after = load_checkpoint(start)["ema"], model_of(runs / "train" / "tuned")
    kernels = [key for key in before if key.endswith("conv.weight")]
    same = {int(key.split(".")[1]) for key in kernels if torch.equal(before[key].float(), after[key])}
    assert same == frozen


def test_label_smoothing_changes_the_class_loss_and_is_kept_with_the_run(
    quick_args: list[str], runs: Path
) -> None:
    for epsilon in ("0", "0.2"):
        # One iteration: what differs is the loss, not what was learned from it.
        words = ["--batch", "8", "--label-smoothing", epsilon, "--name", f"smooth{epsilon}"]
        assert train.main([*quick_args, *words]) == 0
    plain, smooth = (runs / "train" / name for name in ("smooth0", "smooth0.2"))
    assert read_yaml(smooth / "hyp.yaml")["label_smoothing"] == 0.2
    assert rows(smooth)[0]["train/cls_loss"] != rows(plain)[0]["train/cls_loss"]
    assert rows(smooth)[0]["train/box_loss"] == rows(plain)[0]["train/box_loss"]


@pytest.mark.parametrize("named", ["flag", "hyp"])
def test_close_mosaic_shows_single_images_in_the_last_epochs_and_is_kept_with_the_run(
    prepare: Callable[[list[str]], Trainer], quick_args: list[str], tmp_path: Path, named: str
) -> None:
    hyp = tmp_path / "hyp.yaml"
    hyp.write_text("mosaic: 1.0\nclose_mosaic: 1.6\n")
    words = ["--close-mosaic", "2"] if named == "flag" else ["--hyp", str(hyp)]
    closing, plain = (prepare([*quick_args, "--epochs", "3", *more]) for more in (words, []))
    assert closing.hyp.as_dict()["close_mosaic"] == (2 if named == "flag" else 1.6)
    for epoch, same in ((0, True), (1, False), (2, False)):
        first, other = (next(iter(job.loader.epoch(epoch))).images for job in (closing, plain))
        assert torch.equal(first, other) is same


def test_the_seed_decides_the_first_weights_and_what_is_shown(
    prepare: Callable[[list[str]], Trainer], quick_args: list[str]
) -> None:
    a, b, c = (prepare([*quick_args, "--seed", seed]) for seed in "334")
    kernels = [job.model.state_dict()["model.0.conv.weight"] for job in (a, b, c)]
    assert torch.equal(kernels[0], kernels[1])
    assert not torch.equal(kernels[0], kernels[2])
    shown = [next(iter(job.loader.epoch(0))).images for job in (a, b, c)]
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2])


# --- train: how ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("SGD", torch.optim.SGD), ("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW)]
)
def test_the_optimizer_is_the_one_asked_for(
    prepare: Callable[[list[str]], Trainer], quick_args: list[str], name: str, kind: type
) -> None:
    optimizer = prepare([*quick_args, "--optimizer", name]).optimizer
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert group["nesterov"] if name == "SGD" else group["betas"] == (0.937, 0.999)


def test_cos_lr_bends_the_schedule(prepare: Callable[[list[str]], Trainer], quick_args: list[str]) -> None:
    words = [*quick_args, "--epochs", "100"]
    linear, cosine = prepare(words).schedule, prepare([*words, "--cos-lr"]).schedule
    assert linear.factor(25) == pytest.approx(0.75 * 0.99 + 0.01)
    assert cosine.factor(25) == pytest.approx(0.01 + 0.99 * (1 + 2**-0.5) / 2)


@pytest.mark.parametrize("flag", ["--batch-size", "--batch"])
def test_the_batch_is_the_images_of_an_iteration(
    prepare: Callable[[list[str]], Trainer], quick_args: list[str], flag: str
) -> None:
    loader = prepare([*quick_args, flag, "3"]).loader
    assert [len(batch.indices) for batch in loader.epoch(0)] == [3, 3, 2]


@pytest.mark.parametrize("flag", ["--imgsz", "--img", "--img-size"])
def test_the_size_is_that_of_the_images_in_whole_strides(
    prepare: Callable[[list[str]], Trainer], quick_args: list[str], flag: str
) -> None:
    batch = next(iter(prepare([*quick_args, flag, "70"]).loader.epoch(0)))
    assert batch.images.shape[2:] == (80, 80)  # the tiny layout's largest stride is 16


def test_workers_bound_the_loaders_threads_and_the_cpu_takes_one_at_most(
    prepare: Callable[[list[str]], Trainer], quick_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {words: prepare([*quick_args, "--workers", words]) for words in ("0", "8")}
    assert {words: job.loader.workers for words, job in asked.items()} == {"0": 0, "8": 1}
    assert {words: job.val_loader.workers for words, job in asked.items()} == {"0": 0, "8": 1}
    two_gpus(monkeypatch)
    monkeypatch.setattr(device, "container_cpu_count", lambda: 4)
    on_gpu = select_compute("0", "auto")
    assert [on_gpu.loader_threads(asked) for asked in (2, 8)] == [2, 4]


def test_amp_follows_the_hardware_unless_it_is_turned_off(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    for has in (True, False):
        monkeypatch.setattr(device, "cpu_has_bfloat16", lambda has=has: has)
        said.clear()
        used = {amp: select_compute("cpu", amp).bfloat16 for amp in ("auto", "on", "off")}
        assert used == {"auto": has, "on": has, "off": False}
        assert said == ([] if has else ["--amp on: this hardware has no bfloat16, going on in float32"])


@pytest.mark.parametrize(
    ("words", "mode"), [(["ram"], "ram"), ([], "ram"), (["disk"], "disk"), (["off"], "off")]
)
def test_cache_chooses_where_decoded_images_are_kept(
    tiny_args: list[str], tmp_path: Path, words: list[str], mode: str
) -> None:
    config = train_settings.parse_args([*tiny_args, "--cache", *words]).config
    data = load_data(config, 64, tmp_path / "cache")
    assert (data.train_images.mode, data.val_images.mode) == (mode, mode)
    assert bool(list((tmp_path / "cache").glob("*"))) == (mode == "disk")


# --- train: what is written ---------------------------------------------------------------------------------


def test_nosave_writes_the_last_checkpoint_once_and_the_best_all_the_same(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    save = saving.save_checkpoint

    def noting(path: Path, *given: Any, **named: Any) -> None:
        saved.append(path.name)
        save(path, *given, **named)

    monkeypatch.setattr(saving, "save_checkpoint", noting)
    assert train.main([*tiny_args, "--noplots", "--epochs", "3", "--nosave"]) == 0
    assert saved.count("last.pt") == 1
    assert "best.pt" in saved
    saved.clear()
    assert train.main([*tiny_args, "--noplots", "--epochs", "3"]) == 0
    assert saved.count("last.pt") == 3


def test_noval_validates_after_the_final_epoch_only(tiny_args: list[str], runs: Path) -> None:
    assert train.main([*tiny_args, "--noplots", "--epochs", "3", "--noval"]) == 0
    figures = [row["metrics/mAP_0.5"] for row in rows(runs / "train" / "exp")]
    assert figures[:2] == ["", ""]
    assert figures[2] != ""


def test_noplots_draws_nothing(tiny_args: list[str], runs: Path) -> None:
    assert train.main([*tiny_args, "--noplots"]) == 0
    run = runs / "train" / "exp"
    assert [path.name for path in run.rglob("*") if path.suffix in (".jpg", ".png")] == []
    assert (run / "results.csv").is_file()


def test_save_period_keeps_a_checkpoint_every_so_many_epochs(tiny_args: list[str], runs: Path) -> None:
    assert train.main([*tiny_args, "--noplots", "--noval", "--epochs", "5", "--save-period", "2"]) == 0
    kept = {path.name for path in (runs / "train" / "exp" / "weights").glob("epoch*.pt")}
    assert kept == {"epoch1.pt", "epoch3.pt"}


def test_exist_ok_trains_in_the_folder_that_is_there(quick_args: list[str], runs: Path) -> None:
    for epochs in ("1", "2"):
        assert train.main([*quick_args, "--epochs", epochs, "--exist-ok"]) == 0
    assert [path.name for path in (runs / "train").iterdir()] == ["exp"]
    assert len(rows(runs / "train" / "exp")) == 2


# --- val ----------------------------------------------------------------------------------------------------


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> list[ValLoader]:
    """Return the loaders that validations make, and draw nothing."""
    made: list[ValLoader] = []

    class Noted(ValLoader):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            made.append(self)

    monkeypatch.setattr(evaluation, "ValLoader", Noted)
    monkeypatch.setattr(evaluation.plots, "draw_validation", lambda *given: None)
    monkeypatch.setattr(evaluation, "draw_worst", lambda *given: None)
    return made


@pytest.mark.parametrize("flag", ["--batch-size", "--batch"])
def test_val_takes_so_many_images_at_once_with_so_many_threads(
    val_args: list[str], loaders: list[ValLoader], flag: str
) -> None:
    assert val.main([*val_args, flag, "3", "--workers", "0"]) == 0
    assert [len(indices) for indices, _ in loaders[0].batches] == [3, 1]
    assert loaders[0].workers == 0


@pytest.mark.parametrize("flag", ["--imgsz", "--img", "--img-size"])
def test_val_rounds_the_size_up_to_the_stride_and_says_so(
    val_args: list[str], loaders: list[ValLoader], capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert val.main([*val_args, flag, "100"]) == 0
    assert "--imgsz 100 is rounded up to 128" in capsys.readouterr().out
    assert loaders[0].image_size == 128


@pytest.mark.parametrize(("task", "images"), [("train", 8), ("val", 4), ("test", 3)])
def test_a_task_names_the_split(
    val_args: list[str],
    tiny_data: Path,
    tmp_path: Path,
    loaders: list[ValLoader],
    capsys: pytest.CaptureFixture[str],
    task: str,
    images: int,
) -> None:
    tested = tmp_path / "tested.txt"
    listed = sorted((tiny_data.parent / "images" / "train").iterdir())[:3]
    tested.write_text("".join(f"{path}\n" for path in listed))
    data = tmp_path / "with-test.yaml"
    text = tiny_data.read_text().replace("path: .", f"path: {tiny_data.parent}")
    kept = [line for line in text.splitlines() if not line.startswith("test:")]
    data.write_text("\n".join([*kept, f"test: {tested}\n"]))
    assert val.main([*val_args, "--data", str(data), "--task", task]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == images


def test_iou_thres_lets_fewer_or_more_overlapping_boxes_stay(
    val_args: list[str], runs: Path, loaders: list[ValLoader]
) -> None:
    counts = []
    for iou in ("0.1", "0.9"):
        words = ["--conf-thres", "0.05", "--iou-thres", iou, "--save-txt", "--name", f"iou{iou}"]
        assert val.main([*val_args, *words]) == 0
        files = (runs / "val" / f"iou{iou}" / "labels").iterdir()
        counts.append(sum(len(path.read_text().splitlines()) for path in files))
    assert 0 < counts[0] < counts[1]


def test_verbose_prints_each_class_of_a_dataset_of_many(
    val_args: list[str],
    loaders: list[ValLoader],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluation, "LISTED_CLASSES", 3)
    listed = []
    for words in ([], ["--verbose"]):
        assert val.main([*val_args, *words]) == 0
        said = capsys.readouterr().out.splitlines()
        listed.append(
            [line.split()[0] for line in said if line.split()[0] in ("all", "RBC", "WBC", "Platelets")]
        )
    assert listed[0] == ["all"]
    assert listed[1] == ["all", "RBC", "WBC", "Platelets"]


def test_val_writes_below_project_and_name_and_again_there_only_when_told(
    val_args: list[str], runs: Path, loaders: list[ValLoader]
) -> None:
    placed = [*val_args, "--project", "blood", "--name", "first"]
    for words in (placed, [*placed, "--exist-ok"], placed):
        assert val.main(words) == 0
    assert {path.name for path in (runs / "blood").iterdir()} == {"first", "first2"}


# --- detect -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--imgsz", "--img", "--img-size"])
def test_detect_takes_one_side_or_height_and_width_in_whole_strides(
    capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert detect.main([*DETECT_ARGS, flag, "64", "90", "--nosave"]) == 0
    said = capsys.readouterr().out
    assert "--imgsz 90 is rounded up to 96" in said
    assert "--imgsz 64" not in said


def test_agnostic_nms_suppresses_across_classes(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for words in ([], ["--agnostic-nms"]):
        assert detect.main([*DETECT_ARGS, "--conf-thres", "0.001", "--nosave", "--json", *words]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["detections"])
    assert 0 < found[1] < found[0]


def test_augment_looks_more_than_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for words in ([], ["--augment"]):
        assert detect.main([*DETECT_ARGS, "--nosave", "--save-txt", *words]) == 0
        folder = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("results in "))
        found.append((folder / "labels" / f"{IMAGE.stem}.txt").read_text())
    assert found[0] != found[1]


def test_thinner_lines_and_hidden_texts_change_fewer_pixels(runs: Path) -> None:
    original = cv2.imread(str(IMAGE)).astype(int)
    changed = {}
    for name, words in {
        "full": [],
        "thin": ["--line-thickness", "1"],
        "no-confidence": ["--hide-conf"],
        "no-text": ["--hide-labels"],
    }.items():
        assert detect.main([*DETECT_ARGS, "--name", name, *words]) == 0
        drawn = cv2.imread(str(runs / "detect" / name / IMAGE.name))
        changed[name] = int((np.abs(drawn - original).max(2) > 60).sum())
    assert changed["full"] > changed["thin"]
    assert changed["full"] > changed["no-confidence"] > changed["no-text"] > 0


def test_view_img_shows_each_image_with_its_boxes(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[np.ndarray] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "imshow", lambda title, image: shown.append(image.copy()))
    monkeypatch.setattr(cv2, "waitKey", lambda milliseconds: -1)
    assert detect.main([*DETECT_ARGS, "--view-img", "--nosave"]) == 0
    assert len(shown) == 1
    original = cv2.imread(str(IMAGE))
    assert shown[0].shape == original.shape
    assert np.abs(shown[0].astype(int) - original).max() > 100  # a box's line


def test_detect_writes_below_project_and_name_and_again_there_only_when_told(runs: Path) -> None:
    placed = [*DETECT_ARGS, "--project", "blood", "--name", "first"]
    for words in (placed, [*placed, "--exist-ok"], placed):
        assert detect.main(words) == 0
    assert {path.name for path in (runs / "blood").iterdir()} == {"first", "first2"}


def test_half_is_bfloat16_where_the_hardware_has_it(
    val_args: list[str],
    loaders: list[ValLoader],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: True)
    for main, words in ((val.main, val_args), (detect.main, DETECT_ARGS)):
        assert main([*words, "--half"]) == 0
        assert "bfloat16 autocast" in capsys.readouterr().out
        assert main(words) == 0
        assert "bfloat16 autocast" not in capsys.readouterr().out


# --- export -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--batch-size", "--batch"])
def test_an_exported_file_takes_the_batch_asked_for(tmp_path: Path, flag: str) -> None:
    weights = Path(shutil.copyfile(WEIGHTS, tmp_path / "best.pt"))
    assert export.main(["--weights", str(weights), "--include", "onnx", "--img", "64", flag, "2"]) == 0
    (images,) = onnx.load(weights.with_suffix(".onnx")).graph.input
    assert [side.dim_value for side in images.type.tensor_type.shape.dim] == [2, 3, 64, 64]


def test_half_files_have_float16_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The CPU stands in for a GPU, whose place in the export is all that is asked for.
    stand_in = select_compute("cpu", "off")
    monkeypatch.setattr(Compute, "on_cpu", False)
    monkeypatch.setattr(Compute, "describe", lambda self: "a GPU")
    monkeypatch.setattr(exporter, "select_compute", lambda *given: stand_in)
    weights = Path(shutil.copyfile(WEIGHTS, tmp_path / "best.pt"))
    assert export.main(["--weights", str(weights), "--img", "64", "--half", "--device", "0"]) == 0
    graph = onnx.load(weights.with_suffix(".onnx")).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert {t.data_type for t in graph.initializer if len(t.dims) == 4} == {onnx.TensorProto.FLOAT16}
    script = torch.jit.load(str(weights.with_suffix(".torchscript")))
    assert {value.dtype for value in script.parameters()} == {torch.float16}


# --- all four -----------------------------------------------------------------------------------------------


def test_every_alias_means_its_flag() -> None:
    for module in (train_settings, val_settings, detect_settings, export_settings):

        def parse(words: list[str], module: Any = module) -> Any:
            parsed = module.parse_args(words)
            return getattr(parsed, "config", parsed)

        aliased = [declared for declared in module.COMMAND.settings if len(declared.flags) > 1]
        assert aliased
        for declared in aliased:
            configs = [parse([name, "96"]) for name in declared.flags]
            assert all(config == configs[0] for config in configs)
            assert configs[0] != parse([])


@pytest.mark.parametrize("command", MAINS)
@pytest.mark.parametrize("name", ["tpu", "99"])
def test_a_device_that_is_not_there_is_refused(
    tiny_data: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "train": ["--weights", "", "--cfg", str(TINY_LAYOUT), "--data", str(tiny_data)],
        "val": ["--weights", WEIGHTS, "--data", str(tiny_data)],
        "detect": ["--weights", WEIGHTS, "--source", str(IMAGE)],
        "export": ["--weights", WEIGHTS],
    }[command]
    assert MAINS[command]([*words, "--device", name]) == 2
    assert f"--device {name}: " in capsys.readouterr().err


def test_a_gpus_number_takes_that_gpu_and_nothing_takes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    two_gpus(monkeypatch)
    chosen = {words: select_compute(words, "auto").device for words in ("", "0", "1", "cuda:1", "cpu")}
    assert {words: str(place) for words, place in chosen.items()} == {
        "": "cuda:0", "0": "cuda:0", "1": "cuda:1", "cuda:1": "cuda:1", "cpu": "cpu",
    }  # fmt: skip
    with pytest.raises(UsageError, match="GPUs 0 to 1 are visible here"):
        select_compute("2", "auto")


def test_deterministic_takes_kernels_by_rule_where_else_the_fastest_are_sought(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two_gpus(monkeypatch)
    before_benchmark = torch.backends.cudnn.benchmark
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for deterministic in (True, False):
            select_compute("0", "auto", deterministic=deterministic)
            assert torch.backends.cudnn.benchmark is not deterministic
            assert torch.are_deterministic_algorithms_enabled() is deterministic
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = before_benchmark


@pytest.mark.parametrize("command", MAINS)
def test_debug_shows_the_traceback_that_is_left_out_without_it(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, count in (([], 0), (["--debug"], 1)):
        assert MAINS[command](_missing(command, words)) == 4
        assert capsys.readouterr().err.count("Traceback") == count


def _missing(command: str, words: list[str]) -> list[str]:
    """Return a line of a command that fails for want of its weights."""
    more = {"val": ["--data", "bccd.yaml"], "detect": ["--source", str(IMAGE)]}.get(command, [])
    return ["--weights", "missing.pt", "--device", "cpu", *more, *words]


def test_a_flag_cut_short_where_two_begin_so_is_refused() -> None:
    with pytest.raises(UsageError, match="ambiguous"):
        train_settings.parse_args(["--save", "1"])
