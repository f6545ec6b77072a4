"""Draw the curves of precision, recall and F1, the confusion matrix, and the plot of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from starling.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
from dataclasses import dataclass

CurveKind = Literal["F1", "P", "R"]
CURVES: dict[str, str] = {"F1": "F1", "P": "Precision", "R": "Recall"}
MOST_ANNOTATED = 30
"""From this number of classes on, the cells of a confusion matrix are too small for numbers."""
MOST_NAMED = 100
UPRIGHT_FROM = 6
"""With more columns than this, their names are vertical."""


def plot_pr_curve(
    px: np.ndarray,
    py: np.ndarray,
    ap: np.ndarray,
    names: Sequence[str],
    path: Path,
    *,
    classes: Sequence[int] | None = None,
) -> None:
    """Draw `PR_curve.png`: precision over recall at IoU 0.5, one line per class and their mean.

    `px` [points] is the recall, `py` [rows, points] the precision, `ap` [rows] or [rows, IoUs] the average
    precision, IoU 0.5 first. `names` has each row's name; `classes` [rows] each row's class, for its colour (by
    default the row's number). Rows of NaN are left out.

    Raises ValueError if the shapes disagree.
    """
    ap50 = np.asarray(ap, np.float64)
    ap50 = ap50[:, 0] if ap50.ndim == 2 else ap50
    px, py, rows = _checked(px, py, names, classes)
    if len(ap50) != len(py):
        raise ValueError(f"ap is of {len(ap50)} classes, py of {len(py)}")
    overall = f"all classes {_mean(ap50):.3f} mAP@0.5"
    notes = [f"{value:.3f}" for value in ap50]
    _curves(px, py, rows, names, notes, overall, ("Precision-recall curve", "Recall", "Precision"), path)


def plot_confidence_curve(
    kind: CurveKind,
    px: np.ndarray,
    py: np.ndarray,
    names: Sequence[str],
    path: Path,
    *,
    classes: Sequence[int] | None = None,
) -> None:
    """Draw `F1_curve.png`, `P_curve.png` or `R_curve.png`: a value over the confidence threshold.

    `px` [points] is the confidence, `py` [rows, points] the value; `names` and `classes` as for
    `plot_pr_curve`. The legend gives the confidence at which the mean over classes is highest.

    Raises ValueError if the shapes disagree.
    """
    px, py, rows = _checked(px, py, names, classes)
    what = CURVES[kind]
    overall = "all classes"
    measured = py[np.isfinite(py).all(axis=1)]
    if len(measured):
        mean = measured.mean(axis=0)
        peak = int(mean.argmax())
        overall = f"all classes {mean[peak]:.2f} at {px[peak]:.3f}"
    notes = [""] * len(py)
    _curves(px, py, rows, names, notes, overall, (f"{what}-confidence curve", "Confidence", what), path)


def plot_confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draw `confusion_matrix.png`: the share of each true class (column) predicted as each class (row).

    `matrix` [nc+1, nc+1] has counts, predicted in rows, true in columns, the background last in both.
    """
    counts = np.asarray(matrix, np.float64)
    number = len(counts)
    if counts.ndim != 2 or counts.shape[1] != number or number < 1:
        raise ValueError(f"a confusion matrix is square, not {counts.shape}")
    totals = counts.sum(axis=0, keepdims=True)
    shares = counts / np.where(totals > 0, totals, 1)
    side = float(np.clip(2.5 + 0.3 * number, 4.2, 12.0))  # of the matrix, inches
    left, bottom = 1.75, (1.55 if number > UPRIGHT_FROM else 0.75)
    width, height = left + side + 1.0, bottom + side + 0.55
    figure = style.new_figure(width, height)
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    style.dress(axes, "Confusion matrix: share of each true class", "True", "Predicted", grid=False)
    # A cell without an instance stays white.
    shown = np.ma.masked_equal(shares, 0)
    image = axes.imshow(shown, cmap=style.share_map(), vmin=0, vmax=1, interpolation="nearest")
    named = [names[i] if i < len(names) else "" for i in range(number - 1)]
    labels = [*style.figure_names(named, longest=18), "background"]
    _class_ticks(axes, labels, side)
    if number - 1 < MOST_ANNOTATED:
        _annotate(axes, shares, counts, side)
    bar = figure.colorbar(
        image,
        cax=figure.add_axes(((left + side + 0.2) / width, bottom / height, 0.16 / width, side / height)),
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=style.TICK_SIZE, colors=style.INK, length=2)
    style.save_figure(figure, path)


def _class_ticks(axes: Axes, labels: Sequence[str], side: float) -> None:
    """Label rows and columns; if there are too many, only every k-th."""
    number = len(labels)
    places = range(0, number, -(-number // MOST_NAMED))
    size = float(np.clip(side * 72 / number * 0.7, 4.5, style.LABEL_SIZE))
    shown = [labels[i] for i in places]
    axes.set_xticks(places, shown, rotation=90 if number > UPRIGHT_FROM else 0, fontsize=size)
    axes.set_yticks(places, shown, fontsize=size)
    axes.tick_params(length=0)
    borders, end = np.arange(1, number) - 0.5, number - 0.5
    axes.hlines(borders, -0.5, end, color="#eeeeee", linewidth=0.5)
    axes.vlines(borders, -0.5, end, color="#eeeeee", linewidth=0.5)


def _annotate(axes: Axes, shares: np.ndarray, counts: np.ndarray, side: float) -> None:
    """Write the share into each cell, and the count if there is room."""
    cell = side * 72 / len(shares)  # points
    with_counts = cell > 36
    size = float(np.clip(cell / 3.6, 4.5, 11))
    for (row, column), share in np.ndenumerate(shares):
        if counts[row, column] <= 0 or (share < 0.005 and not with_counts):
            continue
        text = f"{share:.2f}" + (f"\n({counts[row, column]:,.0f})" if with_counts else "")
        colour = "white" if share > 0.5 else style.INK
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _checked(
    px: np.ndarray, py: np.ndarray, names: Sequence[str], classes: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return px [points], py [rows, points] as float64, and the class of each row."""
    px, py = np.asarray(px, np.float64).reshape(-1), np.asarray(py, np.float64)
    py = py.reshape(-1, len(px)) if py.size else np.zeros((0, len(px)))
    rows = list(range(len(py))) if classes is None else [int(c) for c in classes]
    if not len(rows) == len(names) == len(py):
        raise ValueError(f"{len(py)} curves, but {len(names)} names and {len(rows)} classes")
    return px, py, rows


def _mean(values: np.ndarray) -> float:
    """Return the mean of the finite values; 0 if there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0


def _curves(
    px: np.ndarray,
    py: np.ndarray,
    classes: Sequence[int],
    names: Sequence[str],
    notes: Sequence[str],
    overall: str,
    texts: tuple[str, str, str],
    path: Path,
) -> None:
    """Draw one line per row and their mean as a thick line; `notes` follow the classes' names in the legend."""
    known = [i for i in range(len(py)) if np.isfinite(py[i]).all()]
    figure = style.new_figure(9, 6)
    named = len(known) <= style.LEGEND_LIMIT
    axes = figure.add_axes((0.075, 0.095, 0.64 if named else 0.89, 0.83))
    style.dress(axes, *texts)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    if known:
        above = 3 if len(known) > 1 else 1  # the mean of a single class would hide its line
        axes.plot(px, py[known].mean(axis=0), color="black", linewidth=3, label=overall, zorder=above)
    labels = style.figure_names(names, longest=22, classes=classes) if named else []
    for i in known:
        colour, dash = style.line_style(classes[i])
        label = f"{labels[i]} {notes[i]}".rstrip() if named else None
        width, opacity = (1.3, 1.0) if named else (0.6, 0.45)
        axes.plot(px, py[i], color=colour, linestyle=dash, label=label, linewidth=width, alpha=opacity)
    if known:
        place = {"loc": "upper left", "bbox_to_anchor": (1.015, 1.01), "frameon": False}
        place = place if named else {"loc": "lower center", "framealpha": 0.95}
        axes.legend(fontsize=style.TICK_SIZE, labelspacing=0.6, **place)
    else:
        style.say_nothing_to_show(axes, "nothing to show: no labelled class was evaluated")
    style.save_figure(figure, path)


@dataclass(frozen=True, slots=True)
class StudyLine:
    """One model over image sizes; the three sequences have the same length."""

    label: str
    sizes: Sequence[int]
    """Image sides in pixels."""
    map5095: Sequence[float]
    milliseconds: Sequence[float]
    """The time per image: pre-process, inference and NMS."""


def plot_study(lines: Sequence[StudyLine], path: Path, *, place: str = "") -> None:
    """Draw mAP50-95 over image size and over time, one line per model; `place` names the hardware of the timing."""
    figure = style.new_figure(12, 5)
    by_size, by_time = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.88, bottom=0.115, wspace=0.08)
    style.dress(by_size, "mAP50-95 by image size", "image side, pixels", "mAP50-95")
    style.dress(by_time, "mAP50-95 by time", f"ms an image{f', {place}' if place else ''}")
    for index, line in enumerate(lines):
        colour, dash = style.line_style(index)
        look = {"color": colour, "linestyle": dash, "linewidth": 1.6, "marker": "o", "markersize": 4}
        by_size.plot(line.sizes, line.map5095, label=style.figure_name([line.label], 0), **look)
        by_time.plot(line.milliseconds, line.map5095, **look)
        best = max(range(len(line.sizes)), key=lambda row: line.map5095[row])
        by_time.annotate(
            f"{line.sizes[best]} px",
            (line.milliseconds[best], line.map5095[best]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=style.TICK_SIZE,
            color=colour,
        )
    by_size.margins(y=0.12)
    by_time.set_xlim(left=0)
    if lines:
        by_size.legend(frameon=False, fontsize=style.LABEL_SIZE, loc="lower right")
    style.save_figure(figure, path)
