"""Every formula agrees with the golden vectors, and the runner notices when one does not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.classic_files import ClassicFiles, trained
from tests.conftest import REPOSITORY
from tests.golden.__main__ import main
from tests.golden.checks import FOREIGN, Check, collect, foreign

VECTORS = Path(__file__).parent / "vectors"
ELSEWHERE = Path(os.environ.get("STARLING_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
"""A folder beside this project that may hold what its licence keeps out of it."""
CHECKS = collect(VECTORS)


@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
def test_agrees_with_the_golden_vector(check: Check) -> None:
    check.run()


def test_agrees_with_a_checkpoint_that_the_classic_trainer_wrote() -> None:
    path = ELSEWHERE / FOREIGN
    if not path.exists():
        pytest.skip(f"no {path}; STARLING_GOLDEN names the folder that holds one")
    for check in foreign(path):
        check.run()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with links to every vector, to replace one of them."""
    for vector in VECTORS.iterdir():
        os.symlink(vector, tmp_path / vector.name)
    return tmp_path


@pytest.fixture
def foreign_file(folder: Path) -> Path:
    """Return a checkpoint in the classic trainer's form, in the folder of links, under the name that is looked for."""
    detector = trained("yolov5n.yaml", names=("RBC", "WBC", "Platelets"))
    return ClassicFiles(folder).write(detector).rename(folder / FOREIGN)


def failures(folder: Path) -> list[str]:
    """Return the names of the checks that fail."""
    failed = []
    for check in collect(folder):
        try:
            check.run()
        except Exception:
            failed.append(check.name)
    return failed


def change_array(path: Path, key: str) -> None:
    """Replace a link to an archive by a copy in which the first number of `key` differs a little."""
    arrays = dict(np.load(path))
    path.unlink()
    changed = arrays[key].copy()
    changed.flat[0] += 0.01
    np.savez(path, **{**arrays, key: changed})


@pytest.mark.parametrize(
    ("file", "key", "check"),
    [
        ("forward.npz", "yolov5n_nc3_decoded", "forward yolov5n_nc3"),
        ("loss_base.npz", "total", "loss base"),
        ("loss_p6.npz", "gradient_abs_sum_3", "loss p6"),
        ("iou.npz", "ciou", "IoU ciou"),
        ("nms.npz", "validate_image1", "NMS validate"),
        ("average_precision.npz", "fitness", "average precision"),
    ],
)
def test_one_changed_number_fails_its_check_alone(folder: Path, file: str, key: str, check: str) -> None:
    change_array(folder / file, key)
    assert failures(folder) == [check]


def test_a_foreign_checkpoint_is_checked_where_the_folder_holds_one(folder: Path, foreign_file: Path) -> None:
    checks = [check for check in collect(folder) if check.name == "foreign checkpoint"]
    assert [check.run() for check in checks] == ["349 tensors, classes RBC, WBC, Platelets"]
    foreign_file.unlink()
    assert [check.name for check in collect(folder)] == [check.name for check in CHECKS]


def test_a_corrupted_vector_makes_the_runner_exit_non_zero(
    folder: Path, foreign_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = json.loads((VECTORS / "model_sizes.json").read_text())
    sizes["yolov5n/nc3"]["parameters"] += 1
    (folder / "model_sizes.json").unlink()
    (folder / "model_sizes.json").write_text(json.dumps(sizes))
    (folder / "iou.npz").unlink()
    (folder / "iou.npz").write_bytes(b"not an archive")
    content = bytearray(foreign_file.read_bytes())
    content[len(content) // 2] ^= 1
    foreign_file.write_bytes(content)
    (folder / "loss_focal.npz").unlink()

    assert main([str(folder)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 4, failed
    for name in ("model size yolov5n/nc3", "loss_focal.npz", "iou.npz", "foreign checkpoint"):
        assert any(line.startswith(f"FAIL  {name}:") for line in failed), name


def test_a_folder_without_vectors_fails(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 1


def test_the_runner_refuses_what_is_not_a_folder(tmp_path: Path) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main(["--help"]) == 2
