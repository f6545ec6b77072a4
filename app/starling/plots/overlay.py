"""Draw the progress of several runs in one plot, from their results.csv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from starling.core.errors import DataError
from starling.plots import style
from starling.plots.results import PANELS, read_results, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_results_overlay(runs: Sequence[Path], path: Path) -> None:
    """Draw the ten panels of `results.png` with two lines per run: the measured values, faint, and smoothed values.

    `runs` are run folders, or results.csv files. Raises DataError if one cannot be read or has no rows.
    """
    tables = [read_results(run / "results.csv" if run.is_dir() else run) for run in runs]
    for run, table in zip(runs, tables, strict=True):
        if not any(len(column) for column in table.values()):
            raise DataError(f"{run}: its results.csv has no epoch yet; leave it out")
    figure = style.new_figure(16, 6.8)
    panels = figure.subplots(2, 5).ravel()
    figure.subplots_adjust(left=0.035, right=0.99, top=0.87, bottom=0.07, wspace=0.24, hspace=0.34)
    for axes, (column, title) in zip(panels, PANELS, strict=True):
        style.dress(axes, title, "epoch" if axes in panels[5:] else "")
        drawn = [_line(axes, table, column, index) for index, table in enumerate(tables)]
        if not any(drawn):
            style.say_nothing_to_show(axes, "not measured")
    _key(figure, run_labels(runs))
    style.save_figure(figure, path)


def run_labels(runs: Sequence[Path]) -> list[str]:
    """Return for each run the shortest end of its path that differs from all others."""
    parts = [(run if run.is_dir() else run.parent).absolute().parts for run in runs]
    deepest = max(len(part) for part in parts)
    labels: list[str] = []
    for length in range(1, deepest + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _line(axes: Axes, table: dict[str, np.ndarray], column: str, index: int) -> bool:
    """Draw one run's column over the epoch; return whether it has a finite value."""
    values = table.get(column, np.zeros(0))
    epochs = table.get("epoch", np.arange(len(values), dtype=np.float64)) + 1  # the CSV counts from 0
    known = np.isfinite(values) & np.isfinite(epochs[: len(values)])
    if not known.any():
        return False
    colour, dash = style.line_style(index)
    x, y = epochs[known], values[known]
    if len(x) < 3:
        axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.2, marker="o", markersize=4)
    else:
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(x, smooth(y), color=colour, linestyle=dash, linewidth=1.8)
    return True


def _key(figure: Figure, labels: Sequence[str]) -> None:
    """Draw the legend of the runs above the panels."""
    from matplotlib.lines import Line2D

    shown = labels[: style.LEGEND_LIMIT]
    handles = []
    for index, label in enumerate(shown):
        colour, dash = style.line_style(index)
        name = style.figure_name([label], 0, longest=40)
        handles.append(Line2D([], [], color=colour, linestyle=dash, linewidth=1.8, label=name))
    if len(labels) > len(shown):
        handles.append(Line2D([], [], linewidth=0, label=f"and {len(labels) - len(shown)} more"))
    figure.legend(
        handles=handles,
        loc="upper center",
        ncols=min(len(handles), 5),
        frameon=False,
        fontsize=style.LABEL_SIZE,
    )
