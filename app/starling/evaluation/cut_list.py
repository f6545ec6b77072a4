"""Figures of a list of detections that was cut short: recall that the list does not reach counts as not found."""

from __future__ import annotations

from starling.data.dataset.dataset import Dataset

WHOLE_UP_TO = 0.01
"""A least confidence up to this one hardly cuts the curve of precision over recall."""


def cut_list(data: Dataset, confidence: float, max_detections: int) -> str | None:
    """Return in one sentence what cuts the list of detections that figures are made of; None for nothing."""
    reasons = []
    if confidence > WHOLE_UP_TO:
        reasons.append(
            f"no detection below confidence {confidence:g} (--conf-thres; whole up to {WHOLE_UP_TO:g})"
        )
    crowded = sum(len(rows) > max_detections for rows in data.labels)
    if crowded:
        most = max(len(rows) for rows in data.labels)
        reasons.append(
            f"{max_detections} detections an image, and images with more labels than that: {crowded} (up to {most})"
        )
    if not reasons:
        return None
    return f"figures of a cut list of detections, so recall and mAP are too low: {'; '.join(reasons)}"
