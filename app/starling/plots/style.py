"""The common style of all plots: palette, text sizes, resolution, and writing to disk.

Figures are built with matplotlib's objects (`Figure`, the Agg canvas), never with pyplot, so there is no global state
and any thread may draw. Only functions that draw import matplotlib, because the import takes 0.4 s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from starling.core.files.atomic import write_atomic
from starling.outputs.names import distinct

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Rgb = tuple[int, int, int]

DPI = 200
"""Pixels per inch of every figure."""
TITLE_SIZE, LABEL_SIZE, TICK_SIZE, NOTE_SIZE = 11.0, 9.5, 8.5, 7.0
"""Text sizes in points."""
INK, FAINT, ACCENT = "#222222", "#d9d9d9", "#d55e00"
DENSITY_MAP = "viridis"
LEGEND_LIMIT = 20
"""The most classes in a readable legend."""
JPEG_QUALITY, PNG_COMPRESSION = 92, 3

# Okabe & Ito (2008), then the muted scheme of Paul Tol (2021): distinguishable with every common colour blindness.
# Pure yellow is left out because it is invisible on white; neighbours differ in lightness and in hue.
PALETTE: tuple[Rgb, ...] = (
    (0x00, 0x72, 0xB2),  # blue
    (0xE6, 0x9F, 0x00),  # orange
    (0x00, 0x9E, 0x73),  # green
    (0xCC, 0x79, 0xA7),  # pink
    (0xD5, 0x5E, 0x00),  # vermilion
    (0x56, 0xB4, 0xE9),  # sky
    (0x88, 0x22, 0x55),  # wine
    (0x99, 0x99, 0x33),  # olive
    (0x33, 0x22, 0x88),  # indigo
    (0x44, 0xAA, 0x99),  # teal
    (0xAA, 0x44, 0x99),  # purple
    (0x11, 0x77, 0x33),  # forest
    (0xDD, 0xCC, 0x77),  # sand
    (0xCC, 0x66, 0x77),  # rose
    (0x66, 0x11, 0x00),  # brown
    (0x88, 0xCC, 0xEE),  # cyan
    (0xEE, 0x33, 0x77),  # magenta
    (0x66, 0x66, 0x66),  # grey
    (0x66, 0x99, 0xCC),  # steel
    (0xBB, 0xCC, 0x33),  # pear
)
LINE_STYLES = ("-", "--", ":", "-.")


def class_colour(index: int) -> Rgb:
    """Return the colour of a class, the same in every plot; after 20 colours they repeat."""
    return PALETTE[index % len(PALETTE)]


def line_style(index: int) -> tuple[str, str]:
    """Return colour (hexadecimal) and dash pattern of a class's line; the dash changes when colours repeat."""
    dash = LINE_STYLES[index // len(PALETTE) % len(LINE_STYLES)]
    return "#{:02x}{:02x}{:02x}".format(*class_colour(index)), dash


def ink_on(colour: Rgb) -> Rgb:
    """Return black or white, whichever has more contrast with `colour` (relative luminance, WCAG 2.2)."""
    channels = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]
    # The contrast ratios with white and with black are equal at sqrt(1.05 * 0.05) - 0.05.
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def class_name(names: Sequence[str] | Mapping[int, str], index: int, *, longest: int = 28) -> str:
    """Return a class's name on one line, shortened in the middle to `longest` characters; `class 7` if it has none."""
    known = index in names if isinstance(names, Mapping) else 0 <= index < len(names)
    name = str(names[index]) if known else ""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return shorten(name, longest) or f"class {index}"


def shorten(text: str, longest: int) -> str:
    """Return `text` in at most `longest` characters (two or more), cut in the middle: names differ at the ends."""
    keep = longest - 1
    return text if len(text) <= longest else text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]


def figure_name(names: Sequence[str] | Mapping[int, str], index: int, *, longest: int = 28) -> str:
    """Return a class's name for matplotlib; `class 7` if most of its characters have no glyph.

    `$` is escaped, because matplotlib would read a formula. A leading `_` is preceded by a hair space, because it
    would hide the name from legends.
    """
    name = class_name(names, index, longest=longest)
    missing = [c for c in name if ord(c) not in _glyphs()]
    drawable = "".join("□" if c in missing else c for c in name)
    if 2 * len(missing) > len(name):
        drawable = f"class {index}"
    return ("\u200a" if drawable.startswith("_") else "") + drawable.replace("$", r"\$")


def figure_names(
    names: Sequence[str], *, longest: int = 28, classes: Sequence[int] | None = None
) -> list[str]:
    """Return unique names of several classes for matplotlib.

    `classes` are their numbers, if they differ from the positions; the numbers distinguish names that are equal after
    shortening, or that cannot be drawn.
    """
    numbers = list(classes) if classes is not None else list(range(len(names)))
    drawable = [
        figure_name({number: name}, number, longest=longest)
        for number, name in zip(numbers, names, strict=True)
    ]
    return list(distinct(drawable, numbers=numbers))


@cache
def _glyphs() -> frozenset[int]:
    """Return the code points of the font that ships with matplotlib."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def lower_end(fitness: Sequence[float]) -> float:
    """Return the lower end of an axis of fitness [n > 0] at which a few collapsed trainings do not flatten the others.

    It is the lowest value, or, if higher, the first decile minus 1.5 times the distance from the median to the best.
    """
    ordered = sorted(fitness)
    tenth, middle, best = ordered[len(ordered) // 10], ordered[len(ordered) // 2], ordered[-1]
    return max(ordered[0], tenth - 1.5 * (best - middle))


def share_map() -> Colormap:
    """Return blues from a tint that is visible on white, for the smallest share, to dark, for the whole."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["Blues"](np.linspace(0.1, 1, 256)))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure; sides in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def dress(axes: Axes, title: str = "", x_label: str = "", y_label: str = "", *, grid: bool = True) -> None:
    """Apply the common style to one panel: two thin spines, a faint grid behind the data, the common text sizes."""
    axes.set_title(title, loc="left", fontsize=TITLE_SIZE, color=INK, pad=8)
    axes.set_xlabel(x_label, fontsize=LABEL_SIZE, color=INK)
    axes.set_ylabel(y_label, fontsize=LABEL_SIZE, color=INK)
    axes.tick_params(labelsize=TICK_SIZE, colors=INK, length=3, width=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#888888")
        spine.set_linewidth(0.6)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(color=FAINT, linewidth=0.5)


def say_nothing_to_show(axes: Axes, reason: str) -> None:
    """Write `reason` in the middle of an empty panel and remove its ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(
        0.5,
        0.5,
        reason,
        transform=axes.transAxes,
        ha="center",
        va="center",
        color="#888888",
        fontsize=LABEL_SIZE,
    )


def save_figure(figure: Figure, path: Path) -> None:
    """Render `figure` and replace `path`; the suffix, .png or .jpg, selects the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_image(np.asarray(canvas.buffer_rgba())[..., :3], path)


def save_image(image: np.ndarray, path: Path) -> None:
    """Encode `image` (uint8 [H,W,3] RGB) in the format of the suffix of `path`, and replace `path` atomically.

    Raises ValueError for a suffix other than .png, .jpg and .jpeg, OSError if the disk refuses the write.
    """
    suffix = path.suffix.lower()
    options = {
        ".png": [cv2.IMWRITE_PNG_COMPRESSION, PNG_COMPRESSION],
        ".jpg": [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY],
        ".jpeg": [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY],
    }
    if suffix not in options:
        raise ValueError(f"{path}: a plot is written as .png or .jpg")
    encoded, payload = cv2.imencode(
        suffix, cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR), options[suffix]
    )
    if not encoded:
        raise ValueError(f"{path}: OpenCV could not encode an image of shape {image.shape}")
    write_atomic(path, payload.tobytes())
