"""Draw a dataset's labels: the number per class, the positions and the sizes of the boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from starling.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_OVERLAID = 1000
"""The most boxes in the overlay; more would make it a solid square."""
MOST_NAMED, MOST_COUNTED = 100, 100
"""The most classes whose names, and whose counts, fit beside the bars."""
UPRIGHT_FROM = 20
"""With more classes than this, names and counts are vertical."""


def plot_labels(labels: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draw `labels.jpg`: instances per class, all boxes centred, density of centres and of sizes.

    `labels` is [n,5]: class, xywhn (centre and size as fractions of the image). n may be 0.
    """
    labels = _clean(labels)
    hspace = 0.42 if len(names) > UPRIGHT_FROM else 0.3
    figure = style.new_figure(12, 8.4)
    grid = figure.add_gridspec(
        2,
        3,
        left=0.065,
        right=0.975,
        top=0.94,
        bottom=0.07,
        hspace=hspace,
        wspace=0.26,
        height_ratios=[1, 1.2],
    )
    _bars(figure.add_subplot(grid[0, :]), labels[:, 0].astype(int), names)
    _overlay(figure.add_subplot(grid[1, 0]), labels)
    centres, sizes = figure.add_subplot(grid[1, 1]), figure.add_subplot(grid[1, 2])
    style.dress(centres, "Box centres", "x (share of image width)", "y (share of image height)", grid=False)
    style.dress(sizes, "Box sizes", "width (share of image)", "height (share of image)", grid=False)
    _density(centres, labels[:, 1], labels[:, 2], 1.0, 1.0)
    centres.invert_yaxis()  # y grows downwards, as in the image
    _density(sizes, labels[:, 3], labels[:, 4], _reach(labels[:, 3]), _reach(labels[:, 4]))
    style.save_figure(figure, path)


def plot_labels_correlogram(labels: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draw `labels_correlogram.jpg`: histograms of the boxes' x, y, width and height, and their pairwise densities.

    `labels` as for `plot_labels`.
    """
    from matplotlib.ticker import MaxNLocator

    labels = _clean(labels)
    titles = ("x", "y", "width", "height")
    limits = (1.0, 1.0, _reach(labels[:, 3]), _reach(labels[:, 4]))
    figure = style.new_figure(10, 10)
    grid = figure.add_gridspec(4, 4, left=0.08, right=0.975, top=0.975, bottom=0.065, hspace=0.1, wspace=0.1)
    for row in range(4):
        for column in range(row + 1):
            axes = figure.add_subplot(grid[row, column])
            style.dress(axes, grid=False)
            if row == column:
                _histogram(axes, labels[:, 1 + row], limits[row])
            else:
                _density(axes, labels[:, 1 + column], labels[:, 1 + row], limits[column], limits[row])
            # Drop the highest tick, which would touch the first one of the next panel.
            axes.xaxis.set_major_locator(MaxNLocator(5, prune="upper"))
            if row != column:
                axes.yaxis.set_major_locator(MaxNLocator(5, prune="upper"))
            axes.tick_params(labelbottom=row == 3, labelleft=column == 0 and row > 0)
            axes.set_xlabel(titles[column] if row == 3 else "", fontsize=style.LABEL_SIZE)
            axes.set_ylabel(titles[row] if column == 0 and row > 0 else "", fontsize=style.LABEL_SIZE)
    figure.align_labels()
    present = len(np.unique(labels[:, 0]))
    figure.text(
        0.975, 0.965, "Where the boxes are, and how large", ha="right", va="top", fontsize=15, color=style.INK
    )
    figure.text(
        0.975,
        0.935,
        f"{len(labels):,} boxes, {present} of {len(names)} classes\nshares of the image's width and height;\n"
        "counts on the diagonal, densities below",
        ha="right",
        va="top",
        fontsize=style.LABEL_SIZE,
        color="#666666",
        linespacing=1.5,
    )
    style.save_figure(figure, path)


def _clean(labels: np.ndarray) -> np.ndarray:
    """Return the finite rows as float64 [n,5]; an empty array of any shape becomes [0,5]."""
    rows = np.asarray(labels, dtype=np.float64).reshape(-1, 5)
    return rows[np.isfinite(rows).all(axis=1)]


def _reach(values: np.ndarray) -> float:
    """Return the end of an axis from 0, adapted to the values, because small boxes would all be in a corner."""
    return float(np.clip(np.max(values, initial=0.0) * 1.05, 0.05, 1.0)) if len(values) else 1.0


def _bars(axes: Axes, classes: np.ndarray, names: Sequence[str]) -> None:
    """Draw one bar per class with its count above."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    number = max(len(names), int(classes.max(initial=-1)) + 1, 1)
    counts = np.bincount(classes[classes >= 0], minlength=number)
    places = np.arange(number)
    style.dress(axes, f"Instances of each class ({counts.sum():,} in all)", "", "instances")
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.bar(
        places,
        counts,
        width=0.8 if number > 8 else 0.5,
        color=[style.line_style(i)[0] for i in range(number)],
    )
    axes.set_xlim(-0.6, number - 0.4)
    upright = number > UPRIGHT_FROM
    # Leave room for the count above the highest bar.
    axes.set_ylim(0, max(int(counts.max()), 1) * (1.25 if upright else 1.1))
    if number <= MOST_NAMED:
        longest = 14 if upright else max(4, 150 // number)
        named = [names[i] if i < len(names) else "" for i in range(number)]
        labels = style.figure_names(named, longest=longest)
        size = float(np.clip(600 / number, 5.5, style.TICK_SIZE))
        axes.set_xticks(places, labels, rotation=90 if upright else 0, fontsize=size)
        axes.tick_params(axis="x", length=0)
    else:
        axes.set_xlabel("class", fontsize=style.LABEL_SIZE)
    if number <= MOST_COUNTED:
        for place, count in zip(places, counts, strict=True):
            axes.annotate(
                f"{count:,}",
                (place, count),
                (0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90 if upright else 0,
                fontsize=5.5 if upright else style.TICK_SIZE,
                color=style.INK if count else style.ACCENT,  # highlight a class without labels
            )


def _overlay(axes: Axes, labels: np.ndarray) -> None:
    """Draw boxes on one centre, in class colours; an evenly spaced selection if there are too many."""
    from matplotlib.collections import LineCollection

    picked = (
        labels[np.unique(np.linspace(0, len(labels) - 1, MOST_OVERLAID).astype(int))]
        if len(labels)
        else labels
    )
    title = "Boxes on one centre" + (
        f" ({len(picked):,} of {len(labels):,})" if len(picked) < len(labels) else ""
    )
    style.dress(axes, title, "width (share of image)", "height (share of image)", grid=False)
    if not len(picked):
        style.say_nothing_to_show(axes, "no labels")
        return
    picked = picked[np.argsort(-picked[:, 3] * picked[:, 4], kind="stable")]  # small boxes on top
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) / 2
    outlines = corners[None] * picked[:, None, 3:5]
    colours = [style.line_style(max(int(c), 0))[0] for c in picked[:, 0]]
    opacity = float(np.clip(40 / len(picked) ** 0.8, 0.15, 0.9))
    axes.add_collection(LineCollection(outlines, colors=colours, linewidths=0.7, alpha=opacity))
    axes.set_xlim(-_reach(picked[:, 3]) / 2, _reach(picked[:, 3]) / 2)
    axes.set_ylim(-_reach(picked[:, 4]) / 2, _reach(picked[:, 4]) / 2)


def _density(axes: Axes, x: np.ndarray, y: np.ndarray, x_end: float, y_end: float) -> None:
    """Draw the number of boxes per cell; empty cells stay white."""
    if not len(x):
        style.say_nothing_to_show(axes, "no labels")
        return
    bins = int(np.clip((len(x) / 4) ** 0.5, 12, 50))  # about four boxes per cell for a uniform distribution
    counts, _, _ = np.histogram2d(x, y, bins=bins, range=((0, x_end), (0, y_end)))
    axes.imshow(
        np.ma.masked_equal(counts.T, 0),
        origin="lower",
        extent=(0, x_end, 0, y_end),
        aspect="auto",
        cmap=style.DENSITY_MAP,
        interpolation="nearest",
    )


def _histogram(axes: Axes, values: np.ndarray, end: float, bins: int = 50) -> None:
    """Draw the histogram of one coordinate."""
    if not len(values):
        style.say_nothing_to_show(axes, "no labels")
        return
    counts, edges = np.histogram(values, bins=bins, range=(0, end))
    axes.stairs(counts, edges, fill=True, color=style.line_style(0)[0])
    axes.set_xlim(0, end)
    axes.set_yticks([])
