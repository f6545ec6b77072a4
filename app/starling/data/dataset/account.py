"""The images and labels that a split leaves out, as lines for people."""

from __future__ import annotations

from starling.data.dataset.dataset import Dataset
from starling.data.dataset.labels import CLIPPED_BEYOND


def left_out(split: Dataset, shown: int = 5) -> list[str]:
    """Return lines that name the left-out images and labels with reasons: a bad mAP must not be the first sign."""
    lines = []
    if split.problems:
        lines.append(f"  {split.skipped} images left out (--strict stops at the first):")
    for finding in (*split.problems[:shown], *split.notes[:shown]):
        lines.append(f"    {finding}")
    more = max(len(split.problems) - shown, 0) + max(len(split.notes) - shown, 0)
    if more:
        lines.append(f"    and {more} more")
    lines += [f"  {line}" for line in split.left_out.lines()]
    if split.unlabelled:
        lines.append(f"  {len(split.unlabelled)} images without a label file, taken for background")
    if split.clipped:
        lines.append(
            f"  {split.clipped} label rows with a value up to {CLIPPED_BEYOND} outside [0, 1], clipped"
        )
    return lines
