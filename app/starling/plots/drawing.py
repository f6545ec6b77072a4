"""Draw boxes and their texts on an image, in a grid of images or alone."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from starling.plots import style
from starling.plots.style import Rgb

WEIGHT = 600
"""Font weight; 400 is regular, 700 is bold."""


class Pen:
    """Writes text of one size; each image needs its own pen, because threads must not share a font face."""

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
        """Write a line of text whose top left corner is (x, y)."""
        baseline = y + round(self.size * 1.02)
        cv2.putText(image, text, (x, baseline), colour, self._face, self.size, WEIGHT)


def draw_boxes(
    image: np.ndarray,
    boxes_xyxy: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray | None,
    names: Sequence[str],
    *,
    texts: Sequence[str] | None = None,
    pen: Pen,
    thickness: int,
    with_text: bool = True,
    with_scores: bool = True,
) -> set[int]:
    """Draw boxes on `image` in place, then their texts on top of all boxes; return the drawn classes.

    `image` is uint8 [H,W,3], `boxes_xyxy` [n,4] in its pixels. Without `scores`, boxes are labels, else detections,
    with the most confident on top. `texts` replace class and score; a text without a free place is left out.
    """
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    kinds = np.asarray(classes, np.float64).reshape(-1)
    if scores is not None:
        scores = np.asarray(scores, np.float64).reshape(-1)
    order = np.argsort(scores if scores is not None else np.zeros(len(boxes)), kind="stable")
    drawable = np.isfinite(boxes).all(axis=1) & np.isfinite(kinds)
    order = order[drawable[order]]
    height, width = image.shape[:2]
    limits = np.array([width, height, width, height]) - 1
    corners = np.clip(np.round(np.nan_to_num(boxes)), 0, limits).astype(int)
    for i in order:  # the most confident last, on top
        start, end = tuple(corners[i, :2].tolist()), tuple(corners[i, 2:].tolist())
        cv2.rectangle(image, start, end, style.class_colour(int(kinds[i])), thickness, cv2.LINE_AA)
    taken: list[tuple[int, int, int, int]] = []
    for i in order[::-1] if with_text else ():
        kind = int(kinds[i])
        if texts is not None:
            text = style.class_name(texts, i, longest=26)
        else:
            text = style.class_name(names, kind, longest=20)
            text += f" {scores[i]:.2f}" if with_scores and scores is not None else ""
        size = (pen.width(text) + 6, pen.height)
        place = free_place(corners[i].tolist(), size, (width, height), taken)
        if place is None:
            continue  # overlapping texts are unreadable; the colour and the legend still show the class
        taken.append((*place, place[0] + size[0], place[1] + size[1]))
        colour = style.class_colour(kind)
        cv2.rectangle(image, place, (place[0] + size[0] - 1, place[1] + size[1] - 1), colour, cv2.FILLED)
        pen.write(image, text, place[0] + 3, place[1], style.ink_on(colour))
    return {int(kinds[i]) for i in order}


def free_place(
    box: Sequence[int],
    size: tuple[int, int],
    limits: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int] | None:
    """Return the top left corner of a free place for a box's text: above, inside or below the box; None without one."""
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


def draw_detections(
    image: np.ndarray,
    detections: np.ndarray,
    names: Sequence[str],
    *,
    thickness: int = 3,
    with_text: bool = True,
    with_scores: bool = True,
) -> None:
    """Draw [n,6] xyxy, confidence, class on `image` (uint8 [H,W,3] RGB) in place."""
    # Text scales with the image, so it has the same size once the image is scaled to a screen.
    pen = Pen(int(np.clip(round(min(image.shape[:2]) / 32), 11, 72)))
    draw_boxes(
        image,
        detections[:, :4],
        detections[:, 5],
        detections[:, 4],
        names,
        pen=pen,
        thickness=thickness,
        with_text=with_text,
        with_scores=with_scores,
    )
