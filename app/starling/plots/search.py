"""Draw a search: fitness over every hyperparameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from starling.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection

COLUMNS = 6
_BOTTOM = 0.75
"""Inches below the panels, for tick labels and the names of unchanged hyperparameters."""


def plot_evolve(hyps: Mapping[str, Sequence[float]], fitness: Sequence[float], path: Path) -> None:
    """Draw `evolve.png`: one panel per hyperparameter, one dot per finished candidate, the best one marked.

    `hyps` maps a name to its values [n]; `fitness` is [n], in the order of the candidates, which the colour shows
    from dark (first) to light. Unchanged hyperparameters have no panel and are named below the panels, unless all are
    unchanged. Collapsed trainings are drawn on the lower edge, because their real values would flatten the others.
    """
    scores = np.asarray(fitness, dtype=np.float64)
    best = int(np.nanargmax(scores)) if np.isfinite(scores).any() else None
    if best is not None:
        scores = np.maximum(scores, style.lower_end(scores[np.isfinite(scores)].tolist()))
    changed = {name: values for name, values in hyps.items() if len(set(values)) > 1}
    fixed = {name: values[0] for name, values in hyps.items() if changed and name not in changed}
    hyps = changed or hyps
    rows = max(math.ceil(len(hyps) / COLUMNS), 1)
    figure = style.new_figure(2.6 * COLUMNS, 2.15 * rows + 1.0)
    panels = figure.subplots(rows, COLUMNS, squeeze=False, sharey=True).ravel()
    top = 1.0 - 0.85 / (2.15 * rows + 1.0)
    figure.subplots_adjust(
        left=0.05, right=0.965, top=top, bottom=_BOTTOM / (2.15 * rows + 1.0), wspace=0.2, hspace=0.7
    )
    dots = None
    for index, (axes, name) in enumerate(zip(panels, hyps, strict=False)):
        values = np.asarray(hyps[name], dtype=np.float64)
        drawn = _panel(axes, name, values, scores, best, "fitness" if index % COLUMNS == 0 else "")
        dots = dots or drawn
    for axes in panels[len(hyps) :]:
        axes.set_visible(False)
    if fixed:
        words = "never changed: " + ",  ".join(f"{name} = {value:.4g}" for name, value in fixed.items())
        figure.text(0.05, 0.012, words, fontsize=style.LABEL_SIZE, color="#666666", wrap=True, va="bottom")
    _key(figure, dots, len(scores), None if best is None else float(scores[best]))
    style.save_figure(figure, path)


def _panel(
    axes: Axes, name: str, values: np.ndarray, scores: np.ndarray, best: int | None, y_label: str
) -> PathCollection:
    """Draw one hyperparameter and return the dots."""
    from matplotlib.ticker import MaxNLocator

    changed = bool(np.ptp(values) > 0) if len(values) else False
    best_value = "" if best is None else f" = {values[best]:.4g}"
    style.dress(axes, f"{name}{best_value}", "" if changed else "never changed", y_label)
    order = np.arange(len(scores))
    dots = axes.scatter(values, scores, c=order, cmap=style.DENSITY_MAP, s=16, alpha=0.8, linewidths=0)
    if best is not None:
        axes.scatter(
            [values[best]],
            [scores[best]],
            s=60,
            facecolors="none",
            edgecolors=style.ACCENT,
            linewidths=1.6,
            zorder=3,
        )
    if changed:
        axes.margins(x=0.08, y=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
        axes.xaxis.set_major_formatter("{x:.4g}")
    else:
        axes.set_xticks(values[:1], [f"{value:.4g}" for value in values[:1]])
    axes.ticklabel_format(axis="y", useOffset=False)
    return dots


def _key(figure: object, dots: PathCollection | None, count: int, best: float | None) -> None:
    """Draw the legend of dots, colours and the ring above the panels."""
    from matplotlib.lines import Line2D

    if dots is None:
        return
    first, last = (dots.get_cmap()(share) for share in (0.0, 1.0))
    ends = [(first, "first candidate"), (last, f"last of {count} finished")][: min(count, 2)]
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=5, color=colour, label=label)
        for colour, label in ends
    ]
    if best is not None:
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker="o",
                markersize=8,
                markerfacecolor="none",
                markeredgecolor=style.ACCENT,
                markeredgewidth=1.6,
                label=f"best: fitness {best:.4g}, its values in the titles",
            )
        )
    figure.legend(  # type: ignore[attr-defined]
        handles=handles, loc="upper center", ncols=len(handles), frameon=False, fontsize=style.LABEL_SIZE
    )
