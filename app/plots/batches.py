"""Pictures of a batch: images in a grid with their labels or detections drawn on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from app.plots import style
from app.plots.style import Rgb

GAP = 6
"""Black pixels between tiles and around them."""
EMPTY = 114
"""Grey of a cell without an image: that of letterbox borders."""
SMALLEST_TILE = 320
"""Images below this longest side are enlarged, else no label could be read."""
WEIGHT = 600
"""Font weight; 400 is regular, 700 is bold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grid:
    """Where the tiles are on the canvas; pixels."""

    columns: int
    rows: int
    scale: float
    tile_hw: tuple[int, int]
    header: int
    footer: int

    @property
    def canvas_hw(self) -> tuple[int, int]:
        height, width = self.tile_hw
        return (
            GAP + self.rows * (height + self.header + GAP) + self.footer,
            GAP + self.columns * (width + GAP),
        )

    def corner(self, index: int) -> tuple[int, int]:
        """Return the top left (x, y) of a tile's image."""
        row, column = divmod(index, self.columns)
        return (
            GAP + column * (self.tile_hw[1] + GAP),
            GAP + row * (self.tile_hw[0] + self.header + GAP) + self.header,
        )


class _Pen:
    """Text of one size; a font face is not shared between threads, so each picture has its own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.height = round(size * 1.35)
        self._face = cv2.FontFace("sans")
        self._widths: dict[str, int] = {}

    def width(self, text: str) -> int:
        if text not in self._widths:
            self._widths[text] = int(cv2.getTextSize((0, 0), text, (0, 0), self._face, self.size, WEIGHT)[2])
        return self._widths[text]

    def fit(self, text: str, width: int) -> str:
        """Return `text`, shortened to `width` pixels."""
        longest = len(text)
        while longest > 2 and self.width(style.shorten(text, longest)) > width:
            longest -= 1
        return style.shorten(text, longest)

    def write(self, image: np.ndarray, text: str, x: int, y: int, colour: Rgb) -> None:
        """Write in a line whose top left is (x, y)."""
        baseline = y + round(self.size * 1.02)
        cv2.putText(image, text, (x, baseline), colour, self._face, self.size, WEIGHT)


def plot_batch(
    images: np.ndarray,
    boxes_xyxy: Sequence[np.ndarray],
    classes: Sequence[np.ndarray],
    scores: Sequence[np.ndarray] | None,
    names: Sequence[str],
    titles: Sequence[str] | None,
    path: Path,
    *,
    texts: Sequence[Sequence[str]] | None = None,
    max_images: int = 16,
    max_side: int = 1920,
) -> None:
    """Draw a grid of a batch's images with boxes, and replace `path` (.jpg or .png).

    `images` is uint8 RGB, [B,H,W,3] or [B,3,H,W]. `boxes_xyxy`, `classes` and `scores` have one array an image:
    [n,4] in pixels of the image as given, [n], [n]. Without `scores` they are labels, else detections. `titles`
    are written above the images, `texts` at the boxes in place of class and score. The first `max_images` are drawn; no side exceeds `max_side` pixels.

    Raises ValueError for a batch that is empty or of another shape.
    """
    tiles = _channels_last(images)[:max_images]
    grid = _arrange(len(tiles), tiles.shape[1:3], max_side, with_titles=titles is not None)
    pen = _Pen(_text_size(grid))
    canvas = np.zeros((*grid.canvas_hw, 3), np.uint8)
    seen: set[int] = set()
    for index in range(grid.columns * grid.rows):
        x, y = grid.corner(index)
        tile = canvas[y : y + grid.tile_hw[0], x : x + grid.tile_hw[1]]
        if index >= len(tiles):
            tile[:] = EMPTY
            continue
        shrinks = grid.scale < 1
        tile[:] = cv2.resize(
            np.ascontiguousarray(tiles[index]),
            grid.tile_hw[::-1],
            interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
        )
        image_scores = None if scores is None else np.asarray(scores[index], np.float64).reshape(-1)
        image_texts = None if texts is None else texts[index]
        seen |= _draw_boxes(
            tile, boxes_xyxy[index], classes[index], image_scores, image_texts, names, grid.scale, pen
        )
        if titles is not None:
            title = pen.fit(style.class_name(titles, index, longest=200), grid.tile_hw[1] - 8)
            pen.write(
                canvas, title, x + 2, y - grid.header + (grid.header - pen.height) // 2, (235, 235, 235)
            )
    _legend(canvas, sorted(seen), names, pen, grid)
    style.save_picture(canvas, path)


def _channels_last(images: np.ndarray) -> np.ndarray:
    """Return the batch as [B,H,W,3]."""
    batch = np.asarray(images)
    if batch.ndim != 4 or not batch.size or batch.dtype != np.uint8:
        raise ValueError(f"images are {batch.dtype} {batch.shape}; uint8 [B,H,W,3] or [B,3,H,W] is drawn")
    if batch.shape[3] == 3:
        return batch
    if batch.shape[1] == 3:
        return batch.transpose(0, 2, 3, 1)
    raise ValueError(f"images are {batch.shape}; neither the second nor the last side is 3 channels")


def _text_size(grid: _Grid) -> int:
    """Return a text size in pixels that suits the tiles."""
    return int(np.clip(round(min(grid.tile_hw) / 36), 11, 18))


def _arrange(number: int, image_hw: tuple[int, ...], max_side: int, *, with_titles: bool) -> _Grid:
    """Return the grid with the largest tiles, and of those the one nearest to a square."""
    height, width = image_hw
    most = max(1.0, SMALLEST_TILE / max(height, width))
    header, footer = (22 if with_titles else 0), 28
    best: tuple[tuple[float, float], _Grid] | None = None
    for columns in range(1, number + 1):
        rows = -(-number // columns)
        scale = min(
            most,
            (max_side - GAP * (columns + 1)) / (columns * width),
            (max_side - footer - GAP * (rows + 1) - header * rows) / (rows * height),
        )
        tile_hw = (max(1, int(height * scale)), max(1, int(width * scale)))
        grid = _Grid(columns=columns, rows=rows, scale=scale, tile_hw=tile_hw, header=header, footer=footer)
        canvas_height, canvas_width = grid.canvas_hw
        rank = (round(scale, 4), -abs(np.log(canvas_width / canvas_height)))
        if scale > 0 and (best is None or rank > best[0]):
            best = rank, grid
    if best is None:
        raise ValueError(f"max_side={max_side}: too small for {number} images")
    return best[1]


def _draw_boxes(
    tile: np.ndarray,
    boxes_xyxy: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray | None,
    texts: Sequence[str] | None,
    names: Sequence[str],
    scale: float,
    pen: _Pen,
) -> set[int]:
    """Draw one image's boxes, then their texts above all boxes; return the classes drawn."""
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4) * scale
    kinds = np.asarray(classes, np.float64).reshape(-1)
    order = np.argsort(scores if scores is not None else np.zeros(len(boxes)), kind="stable")
    drawable = np.isfinite(boxes).all(axis=1) & np.isfinite(kinds)
    order = order[drawable[order]]
    height, width = tile.shape[:2]
    limits = np.array([width, height, width, height]) - 1
    corners = np.clip(np.round(np.nan_to_num(boxes)), 0, limits).astype(int)
    thickness = 2 if min(height, width) >= 300 else 1
    for i in order:  # the surest last, on top
        start, end = tuple(corners[i, :2].tolist()), tuple(corners[i, 2:].tolist())
        cv2.rectangle(tile, start, end, style.class_colour(int(kinds[i])), thickness, cv2.LINE_AA)
    taken: list[tuple[int, int, int, int]] = []
    for i in order[::-1]:
        kind = int(kinds[i])
        if texts is not None:
            text = style.class_name(texts, i, longest=26)
        else:
            text = style.class_name(names, kind, longest=20) + ("" if scores is None else f" {scores[i]:.2f}")
        size = (pen.width(text) + 6, pen.height)
        place = _free_place(corners[i].tolist(), size, (width, height), taken)
        if place is None:
            continue  # its colour and the legend tell the class; a text upon a text tells nothing
        taken.append((*place, place[0] + size[0], place[1] + size[1]))
        colour = style.class_colour(kind)
        cv2.rectangle(tile, place, (place[0] + size[0] - 1, place[1] + size[1] - 1), colour, cv2.FILLED)
        pen.write(tile, text, place[0] + 3, place[1], style.ink_on(colour))
    return {int(kinds[i]) for i in order}


def _free_place(
    box: Sequence[int],
    size: tuple[int, int],
    limits: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int] | None:
    """Return the top left for a box's text: above, inside or below it, where no other text is; else None."""
    left, top, right, bottom = box
    width, height = size
    for x, y in (
        (left - 1, top - height + 1),
        (right - width + 1, top - height + 1),
        (left - 1, top),
        (left - 1, bottom),
        (right - width + 1, bottom),
        (left - 1, bottom - height),
    ):
        x = min(max(x, 0), limits[0] - width)
        if x < 0 or y < 0 or y + height > limits[1]:
            continue
        if all(x >= t[2] or x + width <= t[0] or y >= t[3] or y + height <= t[1] for t in taken):
            return x, y
    return None


def _legend(canvas: np.ndarray, classes: Sequence[int], names: Sequence[str], pen: _Pen, grid: _Grid) -> None:
    """Write the colours of the classes seen below the tiles, as many as fit on one line."""
    x, y = GAP, canvas.shape[0] - grid.footer + (grid.footer - GAP - pen.height) // 2 + 1
    for place, index in enumerate(classes):
        text = style.class_name(names, index, longest=20)
        more = f"+ {len(classes) - place} more"
        room = canvas.shape[1] - x - (pen.width(more) + 2 * GAP if place < len(classes) - 1 else 0)
        if pen.height + 8 + pen.width(text) > room:
            pen.write(canvas, more, x, y, (160, 160, 160))
            return
        corner = (x + pen.height - 5, y + pen.height - 3)
        cv2.rectangle(canvas, (x, y + 2), corner, style.class_colour(index), cv2.FILLED)
        pen.write(canvas, text, x + pen.height + 2, y, (235, 235, 235))
        x += pen.height + pen.width(text) + 22
