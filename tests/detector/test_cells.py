"""The small detector of the tests is what its README says: ours, in half precision, of the files beside it."""

from __future__ import annotations

import torch

from starling.config.hyp import Hyp
from starling.config.yaml_reader import read_yaml
from starling.model.checkpoint import load_checkpoint
from starling.model.layout import read_layout
from tests.conftest import CELL_DETECTOR, REPOSITORY

CONTENT = load_checkpoint(CELL_DETECTOR)


def test_the_weights_are_of_the_layout_and_the_hyperparameters_beside_them() -> None:
    layout = dict(read_layout(CELL_DETECTOR.with_suffix(".yaml")))
    assert {key: CONTENT["layout"][key] for key in layout} == layout
    hyp = Hyp.from_mapping(read_yaml(CELL_DETECTOR.with_suffix(".hyp.yaml")), "cells.hyp.yaml")
    assert CONTENT["hyp"] == hyp.as_dict()
    assert CONTENT["names"] == ["RBC", "WBC", "Platelets"]


def test_the_weights_are_in_half_precision() -> None:
    kinds = {value.dtype for key, value in CONTENT["ema"].items() if not key.endswith("anchors")}
    assert kinds == {torch.float16, torch.int64}


def test_the_training_began_from_scratch_with_files_of_this_project() -> None:
    config = CONTENT["config"]
    assert config["weights"] == ""
    for name in ("cfg", "hyp"):
        assert (REPOSITORY / config[name]).parent == CELL_DETECTOR.parent
    assert config["data"] == "bccd.yaml"
