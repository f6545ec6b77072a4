"""Defaults that depend on the layout: an anchor-free one has other gains and other genes than one with anchors."""

from __future__ import annotations

from pathlib import Path

from starling.config.shipped import find_config
from starling.config.yaml_reader import read_yaml
from starling.core.settings.train import TrainConfig
from starling.model.initial_weights import local_weights, read_weights
from starling.model.layout import is_anchor_free

_USUAL = TrainConfig()
ANCHOR_FREE_HYP, ANCHOR_FREE_SPACE = "hyp.u-scratch.yaml", "u.yaml"


def hyp_file(config: TrainConfig) -> Path:
    """Return the file of hyperparameters: the one that `--hyp` names, or the default of the layout's head."""
    default = config.hyp == _USUAL.hyp and _starts_anchor_free(config)
    return find_config("hyps", ANCHOR_FREE_HYP if default else config.hyp)


def space_file(config: TrainConfig) -> Path:
    """Return the file of the search space: the one that `--space` names, or the default of the layout's head."""
    default = config.space == _USUAL.space and _starts_anchor_free(config)
    return find_config("spaces", ANCHOR_FREE_SPACE if default else config.space)


def _starts_anchor_free(config: TrainConfig) -> bool:
    """Return whether the layout that a training begins with is anchor-free. Nothing is fetched."""
    if config.cfg:
        return is_anchor_free(read_yaml(find_config("layouts", config.cfg)))
    path = local_weights(config.weights) if config.weights else None
    layout = None if path is None else read_weights(path).layout
    return layout is not None and is_anchor_free(layout)
