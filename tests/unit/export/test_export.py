"""Exporting a real detector: the files give its answers, and one that does not is never written."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from starling.cli.export import main
from starling.core.errors import UsageError
from starling.core.settings.export import parse_args
from starling.export import exporter
from starling.export.exporter import Difference
from starling.prediction.inference import load_detector
from tests.conftest import CELL_DETECTOR


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Return a copy of real weights, alone in its folder."""
    return Path(shutil.copyfile(CELL_DETECTOR, tmp_path / "best.pt"))


def expected(images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return load_detector(str(CELL_DETECTOR))(torch.from_numpy(images))[0].numpy()


def some_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).random(shape, dtype=np.float32)


def test_both_formats_lie_beside_the_weights_and_answer_as_the_detector_does(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights.read_bytes()
    assert main(["--weights", str(weights), "--imgsz", "64", "90"]) == 0
    said = capsys.readouterr().out
    assert sorted(path.name for path in weights.parent.iterdir() if path.is_file()) == [
        "best.onnx",
        "best.pt",
        "best.torchscript",
    ]
    assert weights.read_bytes() == before
    images = some_images(1, 3, 64, 96)
    extra = {"config.txt": ""}
    script = torch.jit.load(str(weights.with_suffix(".torchscript")), _extra_files=extra)
    session = onnxruntime.InferenceSession(str(weights.with_suffix(".onnx")))
    for answer in (script(torch.from_numpy(images)).numpy(), session.run(None, {"images": images})[0]):
        assert Difference.of(answer, expected(images)).worst < 1e-4

    metadata = {entry.key: entry.value for entry in onnx.load(weights.with_suffix(".onnx")).metadata_props}
    assert ast.literal_eval(metadata["names"]) == {0: "RBC", 1: "WBC", 2: "Platelets"}
    assert metadata["stride"] == "32"
    assert metadata["imgsz"] == "[64, 96]"
    assert json.loads(extra["config.txt"]) == metadata
    for word in ("rounded up to 96", "MB", "largest differences", "InferenceSession(", "jit.load("):
        assert word in said


def test_a_dynamic_file_takes_another_batch_and_another_size(weights: Path) -> None:
    flags = ["--include", "onnx", "--dynamic", "--imgsz", "64", "--opset", "12"]
    assert main(["--weights", str(weights), *flags]) == 0
    assert not weights.with_suffix(".torchscript").exists()
    model = onnx.load(weights.with_suffix(".onnx"))
    assert model.opset_import[0].version == 12
    session = onnxruntime.InferenceSession(model.SerializeToString())
    images = some_images(2, 3, 32, 128)
    assert Difference.of(session.run(None, {"images": images})[0], expected(images)).worst < 1e-4


def test_a_form_that_answers_otherwise_is_not_written(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exporter._expected
    monkeypatch.setattr(exporter, "_expected", lambda job, images: right(job, images) * 1.001)
    assert main(["--weights", str(weights), "--imgsz", "64", "--include", "torchscript"]) == 1
    assert "not written" in capsys.readouterr().err
    assert not weights.with_suffix(".torchscript").exists()


def test_an_answer_of_another_shape_or_not_a_number_differs() -> None:
    answer = np.ones((1, 4, 8), np.float32)
    assert Difference.of(answer, answer).worst == 0
    assert Difference.of(answer[:, :3], answer).worst == float("inf")
    assert Difference.of(answer * np.nan, answer).worst == float("inf")
    assert Difference.of(answer + 0.01, answer).worst == pytest.approx(0.01, rel=1e-3)


def test_missing_weights_are_a_checkpoint_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", str(tmp_path / "none.pt")]) == 4
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--half"], "GPU"),
        (["--simplify"], "folded already"),
        (["--include", "tflite"], "invalid choice"),
        (["--opset", "9"], "from 12 to 20"),
        (["--batch-size", "0"], "at least 1"),
    ],
)
def test_a_wrong_flag_says_what_and_why(flags: list[str], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        parse_args(flags)
