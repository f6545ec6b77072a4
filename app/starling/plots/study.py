"""The picture of a study: what a larger image brings, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starling.plots import style


@dataclass(frozen=True, slots=True)
class StudyLine:
    """One model over image sizes; the three sequences have one length."""

    label: str
    sizes: Sequence[int]
    """Image sides in pixels."""
    map5095: Sequence[float]
    milliseconds: Sequence[float]
    """For one image: pre-process, inference and NMS."""


def plot_study(lines: Sequence[StudyLine], path: Path, *, place: str = "") -> None:
    """Draw mAP50-95 against image size and against time, a line a model; `place` says where it was timed."""
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
