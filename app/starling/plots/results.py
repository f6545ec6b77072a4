"""Draw a run's progress, from its results.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from starling.core.budget import BudgetExceeded
from starling.core.errors import DataError
from starling.core.files.regular import read_regular
from starling.core.utf8 import NotUtf8, text_of
from starling.core.words import shown
from starling.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BYTES = 8 << 20
"""The size limit of a results.csv that is shown; 10,000 epochs have 3 MB."""
PANELS = (
    ("train/box_loss", "train / box loss"),
    ("train/obj_loss", "train / objectness loss"),
    ("train/cls_loss", "train / class loss"),
    ("metrics/precision", "precision"),
    ("metrics/recall", "recall"),
    ("val/box_loss", "val / box loss"),
    ("val/obj_loss", "val / objectness loss"),
    ("val/cls_loss", "val / class loss"),
    ("metrics/mAP_0.5", "mAP@0.5"),
    ("metrics/mAP_0.5:0.95", "mAP@0.5:0.95"),
)
"""Column and title, in reading order of two rows of five, for a layout with anchors."""
_ANCHOR_FREE = {
    "train/obj_loss": ("train/cls_loss", "train / class loss"),
    "train/cls_loss": ("train/dfl_loss", "train / distribution loss"),
    "val/obj_loss": ("val/cls_loss", "val / class loss"),
    "val/cls_loss": ("val/dfl_loss", "val / distribution loss"),
}
"""What takes a panel's place for an anchor-free layout."""
SMOOTHING = 3.0
"""The standard deviation of the smoothing in rows."""


_MOST_BYTES = 16 << 20
"""Room for 100,000 epochs."""
_MOST_COLUMNS = 1000


def plot_results(csv_path: Path, path: Path, *, best_epoch: int | None = None) -> None:
    """Draw `results.png`: ten panels with the measured values, a smoothed line, and a mark at the best epoch.

    `best_epoch` counts as the CSV does; by default it is the row of highest fitness. Values that are not finite are
    left out; columns may be missing.

    Raises DataError if `csv_path` cannot be read.
    """
    table = read_results(csv_path)
    rows = max((len(column) for column in table.values()), default=0)
    epochs = table.get("epoch", np.arange(rows, dtype=np.float64))
    best = _best_row(table, epochs) if best_epoch is None else _row_of(epochs, best_epoch)
    epochs = epochs + 1  # the CSV counts from 0, the plot and the log from 1
    figure = style.new_figure(16, 6.4)
    panels = figure.subplots(2, 5).ravel()
    figure.subplots_adjust(left=0.035, right=0.99, top=0.89, bottom=0.075, wspace=0.24, hspace=0.34)
    for axes, (column, title) in zip(panels, _panels_of(table), strict=True):
        style.dress(axes, title, "epoch" if axes in panels[5:] else "")
        _panel(axes, epochs, table.get(column, np.full(rows, np.nan)), best)
    _key(figure, epochs, best)
    style.save_figure(figure, path)


def _panels_of(table: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    if "train/dfl_loss" not in table:
        return list(PANELS)
    return [_ANCHOR_FREE.get(column, (column, title)) for column, title in PANELS]


def read_results(csv_path: Path) -> dict[str, np.ndarray]:
    """Return the columns of a results.csv as float64 [rows]; a cell that is not a number becomes NaN.

    Raises DataError if the file cannot be read.
    """
    try:
        text = text_of(read_regular(csv_path, _MOST_BYTES), csv_path)
        lines = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline="")) if row]
        if lines and len(lines[0]) > _MOST_COLUMNS:
            raise BudgetExceeded(f"more than {_MOST_COLUMNS} columns")
    except NotUtf8 as error:
        raise DataError(f"{csv_path}: {error}") from None
    except (OSError, csv.Error, BudgetExceeded) as error:
        raise DataError(
            f"{csv_path}: cannot be read ({shown(error)}); give the results.csv of a run"
        ) from error
    if not lines:
        return {}
    header, *rows = lines
    return {
        name: np.array([_number(row[i]) if i < len(row) else np.nan for row in rows], dtype=np.float64)
        for i, name in enumerate(header)
    }


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def smooth(values: np.ndarray, deviation: float = SMOOTHING) -> np.ndarray:
    """Return `values` [n] smoothed by a Gaussian of `deviation` rows; NaN values have no weight and stay NaN."""
    reach = int(np.ceil(3 * deviation))
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    known = np.isfinite(values)
    # "full" and a slice: for a series shorter than the window, "same" would return the window's length.
    weight = np.convolve(known.astype(np.float64), window, "full")[reach : reach + len(values)]
    total = np.convolve(np.where(known, values, 0.0), window, "full")[reach : reach + len(values)]
    return np.where(known, total / np.where(known, weight, 1.0), np.nan)


def _best_row(table: dict[str, np.ndarray], epochs: np.ndarray) -> int | None:
    """Return the row of highest fitness, the last of equal ones; None without a measured fitness."""
    from starling.metrics import fitness

    if not {"metrics/mAP_0.5", "metrics/mAP_0.5:0.95"} <= table.keys():
        return None
    pairs = zip(table["metrics/mAP_0.5"].tolist(), table["metrics/mAP_0.5:0.95"].tolist(), strict=True)
    scores = np.array([float(fitness(map50, map5095)) for map50, map5095 in pairs])
    if not np.isfinite(scores).any():
        return None
    return int(np.flatnonzero(scores == np.nanmax(scores))[-1])


def _row_of(epochs: np.ndarray, epoch: int) -> int | None:
    """Return the last row of an epoch; None if there is none."""
    rows = np.flatnonzero(epochs == epoch)
    return int(rows[-1]) if len(rows) else None


def _panel(axes: Axes, epochs: np.ndarray, values: np.ndarray, best: int | None) -> None:
    """Draw one column over the epoch."""
    from matplotlib.ticker import MaxNLocator

    known = np.isfinite(values) & np.isfinite(epochs)
    if not known.any():
        style.say_nothing_to_show(axes, "not measured")
        return
    colour, smoothed = style.line_style(5)[0], style.line_style(0)[0]
    x, y = epochs[known], values[known]
    axes.plot(x, y, color=colour, linewidth=1.2, marker="o", markersize=4 if len(x) < 30 else 0)
    if len(x) > 2:
        axes.plot(x, smooth(y), color=smoothed, linewidth=1.8)
    if best is not None and known[best]:
        axes.axvline(epochs[best], color=style.ACCENT, linewidth=0.8, linestyle=":")
        axes.plot(
            [epochs[best]],
            [values[best]],
            marker="o",
            markersize=6,
            color=style.ACCENT,
            markeredgecolor="white",
        )
        axes.set_title(
            f"{values[best]:.3g}", loc="right", fontsize=style.TITLE_SIZE, color=style.ACCENT, pad=8
        )
    axes.margins(x=0.03, y=0.12)
    if x.min() == x.max():
        axes.set_xlim(x[0] - 1, x[0] + 1)
        axes.set_xticks(x[:1])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def _key(figure: Figure, epochs: np.ndarray, best: int | None) -> None:
    """Draw the legend of the lines above the panels."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=style.line_style(5)[0], linewidth=1.2, marker="o", markersize=4, label="measured"
        ),
    ]
    if len(epochs) > 2:
        handles.append(Line2D([], [], color=style.line_style(0)[0], linewidth=1.8, label="smoothed"))
    if best is not None:
        label = f"best epoch: {epochs[best]:g}"
        handles.append(Line2D([], [], color=style.ACCENT, linewidth=0, marker="o", markersize=6, label=label))
    figure.legend(
        handles=handles, loc="upper center", ncols=len(handles), frameon=False, fontsize=style.LABEL_SIZE
    )
