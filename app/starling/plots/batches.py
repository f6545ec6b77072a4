"""Draw a batch: images in a grid with their labels or detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from starling.plots import style
from starling.plots.drawing import Pen, draw_boxes

GAP = 6
"""Black pixels between tiles and around them."""
EMPTY = 114
"""The grey of a cell without an image, as in letterbox borders."""
SMALLEST_TILE = 320
"""Images with a shorter longest side are enlarged to keep labels readable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grid:
    """The layout of the tiles on the canvas, in pixels."""

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
    """Draw a grid of a batch's images with boxes, and replace `path` (.jpg or .png) with it.

    `images` is uint8 RGB, [B,H,W,3] or [B,3,H,W]. `boxes_xyxy`, `classes` and `scores` have one array per image:
    [n,4] in pixels of the given image, [n], [n]. Without `scores`, boxes are labels, else detections. `titles` are
    written above the images, `texts` at the boxes instead of class and score. The first `max_images` are drawn; no
    side exceeds `max_side` pixels.

    Raises ValueError if the batch is empty or has another shape.
    """
    tiles = _channels_last(images)[:max_images]
    grid = _arrange(len(tiles), tiles.shape[1:3], max_side, with_titles=titles is not None)
    pen = Pen(_text_size(grid))
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
        seen |= draw_boxes(
            tile,
            np.asarray(boxes_xyxy[index], np.float64) * grid.scale,
            classes[index],
            None if scores is None else scores[index],
            names,
            texts=None if texts is None else texts[index],
            pen=pen,
            thickness=2 if min(grid.tile_hw) >= 300 else 1,
        )
        if titles is not None:
            title = pen.fit(style.class_name(titles, index, longest=200), grid.tile_hw[1] - 8)
            pen.write(
                canvas, title, x + 2, y - grid.header + (grid.header - pen.height) // 2, (235, 235, 235)
            )
    _legend(canvas, sorted(seen), names, pen, grid)
    style.save_image(canvas, path)


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
    """Return a text size in pixels for the tiles."""
    return int(np.clip(round(min(grid.tile_hw) / 36), 11, 18))


def _arrange(number: int, image_hw: tuple[int, ...], max_side: int, *, with_titles: bool) -> _Grid:
    """Return the grid with the largest tiles; of equal ones, the grid nearest to a square."""
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


def _legend(canvas: np.ndarray, classes: Sequence[int], names: Sequence[str], pen: Pen, grid: _Grid) -> None:
    """Write the colours of the drawn classes below the tiles, as many as fit on one line."""
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
