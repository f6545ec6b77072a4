"""Elements of the charts: scales, ticks, and a plot with title and description for screen readers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from starling.search.report.markup import Markup, element, join, void

COLOURS = 10
"""Number of shades of fitness, `f0` (worst) to `f9`; the style sheet defines them for light and dark mode."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Map the values of one axis to pixels, linear or logarithmic; values outside are drawn at the edge."""

    low: float
    high: float
    start: float
    """Pixel position of `low`; `stop` is that of `high`."""
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel position of a value, rounded to a tenth."""
        share = self.share(value)
        return round(self.start + share * (self.stop - self.start), 1)

    def share(self, value: float) -> float:
        """Return the relative position of a value between the ends, 0 to 1."""
        low, high, value = (self._plain(v) for v in (self.low, self.high, value))
        return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5

    def _plain(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.log else value


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most `most` round values from `low` to `high`, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def shade(rank: int, count: int) -> str:
    """Return the colour class for a rank from 0 (worst) to `count` - 1 (best)."""
    return f"f{rank * COLOURS // count}"


def plot(
    width: float,
    height: float,
    title: str,
    description: str,
    parts: Iterable[Markup],
    *,
    name: str,
    narrowest: float = 700,
) -> Markup:
    """Return an SVG of this size with title and description; `name` is the prefix of its ids on the page.

    On screens below `narrowest` pixels the chart scrolls, because its words would become too small.
    """
    return element(
        "div",
        element(
            "svg",
            element("title", title, id=f"{name}-title"),
            element("desc", description, id=f"{name}-desc"),
            *parts,
            viewBox=f"0 0 {width:g} {height:g}",
            role="img",
            aria_labelledby=f"{name}-title {name}-desc",
            class_="chart",
            style=f"min-width:{narrowest:.0f}px",
        ),
        class_="scroll",
        tabindex="0",
        role="group",
        aria_label=title,
    )


def titled(name: str, title: str, *children: object, **attributes: object) -> Markup:
    """Return a shape that shows `title` as a tooltip."""
    return element(name, element("title", title), *children, **attributes)


def label(x: float, y: float, words: str, *, anchor: str = "start", class_: str | None = None) -> Markup:
    """Return text at (`x`, `y`)."""
    return element(
        "text",
        words,
        x=f"{x:g}",
        y=f"{y:g}",
        text_anchor=None if anchor == "start" else anchor,
        class_=class_,
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return void("line", x1=f"{x1:g}", y1=f"{y1:g}", x2=f"{x2:g}", y2=f"{y2:g}", class_=class_)


def path(points: Iterable[tuple[float, float]]) -> str:
    """Return the `d` attribute of a path through points."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def grid(
    x_ticks: Iterable[tuple[float, str]],
    y_ticks: Iterable[tuple[float, str]],
    *,
    left: float,
    right: float,
    top: float,
    bottom: float,
) -> Markup:
    """Return a faint grid with tick labels, given as (pixel, words)."""
    parts = [
        join(line(left, y, right, y, "grid"), label(left - 6, y + 4, words, anchor="end"))
        for y, words in y_ticks
    ]
    parts += [
        join(line(x, top, x, bottom, "grid"), label(x, bottom + 17, words, anchor="middle"))
        for x, words in x_ticks
    ]
    return join(*parts)
