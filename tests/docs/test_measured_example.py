"""The figures of docs/val.md that depend on the batch are those that val.py gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from starling.cli import val
from tests.conftest import CELL_DETECTOR, MINI_SET, REPOSITORY

WEIGHTS = CELL_DETECTOR
PAGE = (REPOSITORY / "docs" / "val.md").read_text(encoding="utf-8")


def table() -> dict[str, dict[int, float]]:
    """Return the rows of the example: figure -> batch -> value."""
    rows = {}
    for name in ("`--batch`", "mAP50", "mAP50-95"):
        (row,) = re.findall(rf"^\| {re.escape(name)} \|(.+)\|$", PAGE, re.MULTILINE)
        rows[name] = [float(cell) for cell in row.split("|")]
    batches = [int(batch) for batch in rows.pop("`--batch`")]
    return {name: dict(zip(batches, values, strict=True)) for name, values in rows.items()}


def cut_out(labels: str, whole: tuple[int, int], size: tuple[int, int]) -> str:
    """Return label rows of an image's upper left part; boxes are kept of which half is left."""
    rows = []
    for line in labels.splitlines():
        number, *xywhn = line.split()
        x, y, w, h = (float(value) * side for value, side in zip(xywhn, whole * 2, strict=True))
        x1, y1 = x - w / 2, y - h / 2
        x2, y2 = min(x + w / 2, size[0]), min(y + h / 2, size[1])
        if x1 < x2 and y1 < y2 and (x2 - x1) * (y2 - y1) >= w * h / 2:
            box = ((x1 + x2) / 2 / size[0], (y1 + y2) / 2 / size[1], (x2 - x1) / size[0], (y2 - y1) / size[1])
            rows.append(" ".join((number, *(f"{value:.6f}" for value in box))))
    return "\n".join(rows)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """Return the YAML of the 20 images of five shapes that the page describes."""
    (described,) = re.findall(r"parts of ([\d×, and]+) pixels", PAGE.replace("\n", " "))
    sizes = [(int(width), int(height)) for width, height in re.findall(r"(\d+)×(\d+)", described)]
    assert len(sizes) == 5
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for index, path in enumerate(sorted((MINI_SET / "images" / "val").glob("*.jpg"))[:20]):
        size = sizes[index % len(sizes)]
        with Image.open(path) as image:
            image.crop((0, 0, *size)).save(tmp_path / "images" / path.name, quality=95)
            labels = (MINI_SET / "labels" / "val" / f"{path.stem}.txt").read_text()
            (tmp_path / "labels" / f"{path.stem}.txt").write_text(cut_out(labels, image.size, size))
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [RBC, WBC, Platelets]\n")
    return tmp_path / "data.yaml"


def test_the_figures_of_the_example_depend_on_the_batch_as_the_page_says(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("starling.evaluation.evaluation.draw_worst", lambda *args: None)
    expected = table()
    assert expected["mAP50"][1] != expected["mAP50"][20]
    for batch in (1, 20):
        flags = ["--weights", str(WEIGHTS), "--data", str(example), "--img", "160", "--device", "cpu"]
        assert val.main([*flags, "--batch", str(batch), "--json"]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert told["mAP50"] == pytest.approx(expected["mAP50"][batch], abs=3e-4)
        assert told["mAP50_95"] == pytest.approx(expected["mAP50-95"][batch], abs=3e-4)
