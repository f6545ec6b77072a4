"""Plots for ClearML's page: Plotly figures in JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starling.core.plain_json import parse_json

_WIDTH = 640


def image_plot(url: str, path: Path) -> dict[str, Any]:
    """Return a figure with the image at `url`; its proportions are read from `path`."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        width, height = 4, 3
    shown = _WIDTH * height // max(width, 1)
    image_on_axes = {
        "source": url, "xref": "x", "yref": "y", "x": 0, "y": shown, "sizex": _WIDTH, "sizey": shown,
        "sizing": "contain", "layer": "below", "opacity": 1.0,
    }  # fmt: skip
    return {
        "data": [],
        "layout": {
            "title": path.stem,
            "showlegend": False,
            "margin": {"l": 0, "r": 0, "t": 64, "b": 0},
            "xaxis": {"visible": False, "range": [0, _WIDTH]},
            "yaxis": {"visible": False, "range": [0, shown], "scaleanchor": "x"},
            "images": [image_on_axes],
        },
    }


def confusion_plot(text: str) -> dict[str, Any]:
    """Return a heat map of the confusion matrix in `text`: JSON of `names` and `counts` [predicted][true].

    Raises ValueError or KeyError for anything else.
    """
    matrix = parse_json(text)
    names, counts = [str(name) for name in matrix["names"]], matrix["counts"]
    return {
        "data": [
            {
                "type": "heatmap",
                "x": names,
                "y": names,
                "z": counts,
                "texttemplate": "%{z}",
                "colorscale": "Blues",
            }
        ],
        "layout": {
            "title": "confusion matrix",
            "xaxis": {"title": "true"},
            "yaxis": {"title": "predicted", "autorange": "reversed"},
        },
    }
