"""The plots of a run: written whole, of the right size, and able to take any dataset."""

from __future__ import annotations

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from starling.cli.plots import main as plots_main
from starling.core.errors import DataError
from starling.plots import batches, curves, drawing, labels, overlay, results, style
from tests.conftest import REPOSITORY

HARD_NAMES = ("$x_1$", "_hidden", "Größe", "红细胞", "50 $", r"a\$b$", "two\nlines", "", "n" * 200)
RESULTS_HEADER = (
    "epoch,train/box_loss,train/obj_loss,train/cls_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,"
    "metrics/mAP_0.5:0.95,val/box_loss,val/obj_loss,val/cls_loss,x/lr0,x/lr1,x/lr2"
)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    """A missing glyph or a division by zero is a warning; none is to reach a user's log."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def read(path: Path) -> np.ndarray:
    """Return the RGB plot of `path`, which must be decodable and not of one colour."""
    image = cv2.imread(str(path))
    assert image is not None, f"{path} cannot be decoded"
    assert image.std() > 1, f"{path} is of one colour"
    return image[..., ::-1]


def some_labels(number: int, classes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kinds = np.arange(number) % classes
    return np.column_stack((kinds, rng.uniform(0.2, 0.8, (number, 2)), rng.uniform(0.01, 0.3, (number, 2))))


def some_curves(number: int) -> tuple[np.ndarray, np.ndarray]:
    px = np.linspace(0, 1, 1000)
    return px, np.clip(1 - px[None] ** np.linspace(2, 9, number)[:, None], 0, 1)


def grey_images(number: int, height: int, width: int) -> np.ndarray:
    return np.full((number, height, width, 3), 128, np.uint8)


def near(image: np.ndarray, colour: tuple[int, int, int], tolerance: int = 40) -> int:
    """Return how many pixels are about of this colour."""
    return int((np.abs(image.astype(int) - colour).max(axis=2) <= tolerance).sum())


# Labels


@pytest.mark.parametrize(("number", "classes"), [(0, 3), (1, 1), (300, 9), (4000, 80)])
def test_label_plots_are_drawn_for_any_number_of_labels_and_classes(
    tmp_path: Path, number: int, classes: int
) -> None:
    names = HARD_NAMES if classes == 9 else [f"class {i}" for i in range(classes)]
    labels.plot_labels(some_labels(number, classes), names, tmp_path / "labels.jpg")
    labels.plot_labels_correlogram(some_labels(number, classes), names, tmp_path / "correlogram.jpg")
    assert read(tmp_path / "labels.jpg").shape == (1680, 2400, 3)
    assert read(tmp_path / "correlogram.jpg").shape == (2000, 2000, 3)


def test_labels_that_are_not_finite_or_beyond_the_names_are_no_reason_to_fail(tmp_path: Path) -> None:
    rows = np.array([[0, 0.5, 0.5, 0.1, 0.1], [7, 0.5, 0.5, 0.2, 0.2], [0, np.nan, 0.5, 0.1, 0.1]])
    labels.plot_labels(rows, ("only one",), tmp_path / "labels.jpg")
    assert read(tmp_path / "labels.jpg").std() > 0


# Batches


def test_boxes_are_drawn_in_class_colours_where_they_belong(tmp_path: Path) -> None:
    path = tmp_path / "batch.png"
    boxes = [np.array([[100, 200, 300, 400]], float), np.zeros((0, 4))]
    kinds = [np.array([3]), np.zeros(0)]
    batches.plot_batch(grey_images(2, 640, 640), boxes, kinds, None, list("abcde"), None, path)
    image = read(path)
    colour = style.class_colour(3)
    left, right = image[:, : image.shape[1] // 2], image[:-40, image.shape[1] // 2 :]
    assert near(left, colour) > 1000
    assert near(right, colour) == 0
    ys, xs = np.nonzero(np.abs(left[:-40].astype(int) - colour).max(axis=2) < 10)
    gap = batches.GAP
    scale = (image.shape[1] - 3 * gap) / 2 / 640
    assert xs.min() == pytest.approx(gap + 100 * scale, abs=4)
    assert xs.max() == pytest.approx(gap + 300 * scale, abs=4)
    assert ys.max() == pytest.approx(gap + 400 * scale, abs=4)


def test_channels_first_and_channels_last_give_the_same_plot(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, 64, 96, 3), dtype=np.uint8)
    for name, batch in (("last", images), ("first", images.transpose(0, 3, 1, 2))):
        empty = [np.zeros((0, 4))] * 3
        batches.plot_batch(batch, empty, [np.zeros(0)] * 3, None, ("a",), None, tmp_path / f"{name}.png")
    assert (tmp_path / "last.png").read_bytes() == (tmp_path / "first.png").read_bytes()


@pytest.mark.parametrize(
    "shape", [(1, 640, 640), (5, 64, 64), (16, 640, 640), (40, 384, 672), (7, 1280, 320)]
)
def test_no_side_of_a_grid_exceeds_the_limit(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    path = tmp_path / "batch.jpg"
    boxes, kinds = [np.array([[1.0, 1, 50, 50]])] * shape[0], [np.zeros(1)] * shape[0]
    titles = [f"{'long' * 40}{i}.jpg" for i in range(shape[0])]
    batches.plot_batch(grey_images(*shape), boxes, kinds, None, ("a",), titles, path, max_side=1000)
    assert max(read(path).shape) <= 1000


def test_only_the_first_images_of_a_large_batch_are_drawn(tmp_path: Path) -> None:
    images = grey_images(6, 64, 64)
    images[4:] = (255, 0, 255)
    path = tmp_path / "batch.png"
    batches.plot_batch(
        images, [np.zeros((0, 4))] * 6, [np.zeros(0)] * 6, None, ("a",), None, path, max_images=4
    )
    assert near(read(path), (255, 0, 255)) == 0


def test_detections_with_hard_names_scores_and_wild_boxes_are_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    boxes = rng.uniform(-200, 900, (300, 4))
    boxes[0] = np.nan
    boxes[1] = np.inf
    kinds, scores = rng.integers(0, 12, 300), rng.uniform(0, 1, 300)
    path = tmp_path / "pred.jpg"
    batches.plot_batch(grey_images(1, 320, 320), [boxes], [kinds], [scores], HARD_NAMES, ["$a$.jpg"], path)
    assert read(path).std() > 10


def test_texts_never_cover_each_other() -> None:
    taken: list[tuple[int, int, int, int]] = []
    for _ in range(20):
        place = drawing.free_place((50, 50, 90, 90), (40, 15), (200, 200), taken)
        if place is None:
            break
        box = (*place, place[0] + 40, place[1] + 15)
        assert all(box[0] >= t[2] or box[2] <= t[0] or box[1] >= t[3] or box[3] <= t[1] for t in taken)
        taken.append(box)
    assert 2 <= len(taken) < 20


@pytest.mark.parametrize(
    "images",
    [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 4), np.uint8), np.zeros((1, 8, 8, 3), np.float32)],
)
def test_a_batch_of_another_kind_is_refused_with_its_shape(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="images are"):
        batches.plot_batch(images, [], [], None, (), None, tmp_path / "batch.jpg")
    assert not list(tmp_path.iterdir())


# Results


def write_results(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join([RESULTS_HEADER, *rows]) + "\n")
    return path


def result_row(epoch: int, map5095: float, val_loss: str = "0.05") -> str:
    return (
        f"{epoch},0.1,0.05,0.02,0.6,0.5,{map5095 + 0.2},{map5095},{val_loss},{val_loss},0.02,0.01,0.01,0.01"
    )


@pytest.mark.parametrize("number", [0, 1, 60])
def test_results_are_drawn_for_any_number_of_epochs(tmp_path: Path, number: int) -> None:
    rows = [result_row(i, 0.01 * i, "nan" if i % 3 else "inf") for i in range(number)]
    results.plot_results(write_results(tmp_path / "r.csv", rows), tmp_path / "results.png", best_epoch=0)
    assert read(tmp_path / "results.png").shape == (1280, 3200, 3)


def test_results_need_neither_every_column_nor_whole_rows(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("  epoch , train/box_loss\n0,0.5\n1,\n2\n3,oops\n")
    results.plot_results(tmp_path / "r.csv", tmp_path / "results.png", best_epoch=0)
    read(tmp_path / "results.png")
    table = results.read_results(tmp_path / "r.csv")
    np.testing.assert_array_equal(table["train/box_loss"], [0.5, np.nan, np.nan, np.nan])


def test_the_best_epoch_is_the_row_of_highest_fitness(tmp_path: Path) -> None:
    pytest.importorskip("starling.metrics")
    rows = [result_row(10, 0.2), result_row(11, 0.6), result_row(12, float("nan")), result_row(13, 0.4)]
    table = results.read_results(write_results(tmp_path / "r.csv", rows))
    assert results._best_row(table, table["epoch"]) == 1


def test_missing_results_say_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.csv"):
        results.plot_results(tmp_path / "nothing.csv", tmp_path / "results.png")


def test_smoothing_keeps_constants_lengths_and_gaps() -> None:
    values = np.array([2.0, 2.0, np.nan, 2.0, 2.0])
    np.testing.assert_allclose(results.smooth(values), values)
    zigzag = np.tile([0.0, 1.0], 20)
    assert np.ptp(results.smooth(zigzag)[5:-5]) < 0.05
    assert len(results.smooth(np.array([1.0]))) == 1


# Curves and the confusion matrix


@pytest.mark.parametrize("number", [1, 9, 80])
def test_curves_are_drawn_for_any_number_of_classes(tmp_path: Path, number: int) -> None:
    px, py = some_curves(number)
    names = HARD_NAMES if number == 9 else [f"class {i}" for i in range(number)]
    curves.plot_pr_curve(px, py, py.mean(axis=1), names, tmp_path / "PR_curve.png")
    curves.plot_confidence_curve("F1", px, py, names, tmp_path / "F1_curve.png")
    for name in ("PR_curve.png", "F1_curve.png"):
        assert read(tmp_path / name).shape == (1200, 1800, 3)


def test_curves_of_no_class_or_of_absent_classes_are_drawn(tmp_path: Path) -> None:
    px, py = some_curves(2)
    py[1] = np.nan
    curves.plot_pr_curve(
        px, py, np.array([[0.5, 0.4], [np.nan, np.nan]]), "ab", tmp_path / "PR.png", classes=[4, 9]
    )
    curves.plot_confidence_curve("P", px, np.zeros((0, 1000)), [], tmp_path / "P.png")
    image = read(tmp_path / "PR.png")
    assert near(image, style.class_colour(4), 12) > 300
    assert near(image, style.class_colour(9), 12) == 0
    read(tmp_path / "P.png")


def test_curves_and_names_that_disagree_are_refused(tmp_path: Path) -> None:
    px, py = some_curves(3)
    with pytest.raises(ValueError, match="3 curves, but 2 names"):
        curves.plot_confidence_curve("R", px, py, ("a", "b"), tmp_path / "R.png")


@pytest.mark.parametrize("number", [1, 9, 80])
def test_a_confusion_matrix_is_drawn_for_any_number_of_classes(tmp_path: Path, number: int) -> None:
    matrix = np.diag(np.arange(number + 1.0))
    names = HARD_NAMES if number == 9 else [f"class {i}" for i in range(number)]
    curves.plot_confusion_matrix(matrix, names, tmp_path / "confusion_matrix.png")
    assert read(tmp_path / "confusion_matrix.png").shape[0] >= 900


def test_a_confusion_matrix_without_counts_is_drawn(tmp_path: Path) -> None:
    curves.plot_confusion_matrix(np.zeros((4, 4)), "abc", tmp_path / "confusion_matrix.png")
    assert read(tmp_path / "confusion_matrix.png").std() > 0


def test_the_share_is_of_the_true_class_in_the_column(tmp_path: Path) -> None:
    path = tmp_path / "confusion_matrix.png"
    # All 4 of the true class 0 were taken for class 1: only the cell in row 1, column 0 is dark.
    curves.plot_confusion_matrix(np.array([[0, 0, 0], [4, 0, 0], [0, 0, 0]]), "ab", path)
    image = read(path)
    dark = np.abs(image.astype(int) - image[600, 400]).max(axis=2) < 3
    side = 4.2 * style.DPI
    left, top = 1.75 * style.DPI, 0.55 * style.DPI
    cell = (
        slice(int(top + side / 3) + 3, int(top + 2 * side / 3) - 3),
        slice(int(left) + 4, int(left + side / 3) - 3),
    )
    assert image[cell].mean() < 110
    assert dark[cell].mean() > 0.7


# Style


def test_twenty_classes_have_twenty_colours_and_later_ones_another_dash() -> None:
    assert len({style.class_colour(i) for i in range(20)}) == 20
    assert style.class_colour(20) == style.class_colour(0)
    assert len({style.line_style(i) for i in range(80)}) == 80


@pytest.mark.parametrize("index", range(20))
def test_text_on_a_class_colour_has_a_contrast_of_at_least_four_and_a_half(index: int) -> None:
    def luminance(colour: style.Rgb) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    colour = style.class_colour(index)
    pair = sorted((luminance(colour), luminance(style.ink_on(colour))))
    assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5


def test_long_names_keep_both_ends() -> None:
    assert style.class_name(["a very long name 17"], 0, longest=9) == "a ve…e 17"
    assert style.class_name(["short"], 0) == "short"
    assert style.class_name([], 7) == "class 7"


def test_a_plot_of_unknown_format_is_refused_and_the_old_one_kept(tmp_path: Path) -> None:
    path = tmp_path / "plot.gif"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"\.png or \.jpg"):
        style.save_image(np.zeros((4, 4, 3), np.uint8), path)
    assert path.read_bytes() == b"old"


def test_threads_can_draw_at_once(tmp_path: Path) -> None:
    px, py = some_curves(3)

    def draw(index: int) -> bytes:
        path = tmp_path / f"{index}.png"
        curves.plot_confidence_curve("F1", px, py, ("$a$", "b", "c"), path)
        return path.read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(draw, range(8)))) == 1


def test_drawing_leaves_no_pyplot_and_importing_costs_no_matplotlib() -> None:
    check = (
        "import sys; from starling.plots import batches, curves, labels, results, style; import numpy as np, pathlib;"
        "assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules;"
        "style.figure_name(['a'], 0); style.new_figure(2, 2);"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=REPOSITORY, timeout=60)


# Several runs


def write_run(folder: Path, epochs: int) -> Path:
    folder.mkdir(parents=True)
    rows = [f"{epoch},{0.1 / (epoch + 1):.4f},{epoch / 50}" for epoch in range(epochs)]
    (folder / "results.csv").write_text("\n".join(["epoch,train/box_loss,metrics/mAP_0.5", *rows, ""]))
    return folder


def test_several_runs_are_laid_over_each_other_in_colours_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write_run(tmp_path / project / "exp", epochs) for project, epochs in (("a", 20), ("b", 12))]
    out = tmp_path / "both.png"
    assert plots_main([*map(str, folders), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    plot = read(out)
    assert all(near(plot, style.class_colour(index)) > 500 for index in (0, 1))
    assert overlay.run_labels(folders) == ["a/exp", "b/exp"]


def test_a_run_without_results_is_named_in_place_of_an_empty_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = write_run(tmp_path / "empty", 0)
    assert plots_main([str(empty), "--out", str(tmp_path / "out.png")]) == 3
    assert "no epoch yet" in capsys.readouterr().err
    assert plots_main([str(tmp_path / "absent"), "--out", str(tmp_path / "out.png")]) == 3
    assert not (tmp_path / "out.png").exists()
    assert plots_main([str(empty), "--out", "out.pdf"]) == 2
