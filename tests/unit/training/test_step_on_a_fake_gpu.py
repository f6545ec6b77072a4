"""A whole training step runs on a GPU that is a double: torch's fake tensors, which have a device, shapes and no values.

A tensor left on the CPU that meets one of the GPU fails there, and so does whatever would make the host wait for the
device: reading a value (`.item()`), and shapes that depend on values (`nonzero`, boolean masks). The backward pass needs a
real GPU; gradients are made up.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from starling.config.hyp import Hyp
from starling.config.shipped import SHIPPED
from starling.config.yaml_reader import read_yaml
from starling.model.detector import Detector, build_detector
from starling.model.layout import is_anchor_free
from starling.training.learner import LossWatch
from starling.training.optimizer import ExponentialMovingAverage, build_optimizer

LAYOUTS = sorted(path.name for path in (SHIPPED / "layouts").glob("*.yaml"))
SIDE = 128


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """Return a device whose tensors are fake, for the length of a test."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
            warnings.simplefilter("ignore")
            yield torch.device("cuda")
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def hyp_of(name: str) -> Hyp:
    free = is_anchor_free(read_yaml(SHIPPED / "layouts" / name))
    return Hyp.from_mapping(
        read_yaml(SHIPPED / "hyps" / f"hyp.{'u-scratch' if free else 'scratch-low'}.yaml")
    )


CASES = [*((name, "SGD") for name in LAYOUTS), ("yolov5n.yaml", "AdamW"), ("yolov5nu.yaml", "AdamW")]


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_no_part_of_a_step_is_on_another_device_or_waits(
    name: str, optimizer: str, gpu: torch.device
) -> None:
    hyp = hyp_of(name)
    model = _moved(name, gpu).train()
    loss = model.head.build_loss(hyp, SIDE)
    chosen, average, watch = (
        build_optimizer(model, optimizer, hyp, 16),
        ExponentialMovingAverage(model),
        LossWatch(gpu),
    )
    side = SIDE if SIDE % model.image_multiple == 0 else model.image_multiple
    images, targets = torch.rand(2, 3, side, side, device=gpu), torch.rand(128, 6, device=gpu)

    total, parts = loss(model(images), targets)
    assert (total.device.type, parts.device.type) == ("cuda", "cuda")
    watch.look(parts.sum(), 1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    chosen.step()
    chosen.zero_grad(set_to_none=True)
    average.update()

    with torch.no_grad():
        decoded, raw = average.model(images)
        assert decoded.device.type == "cuda"
        _, parts = loss(raw, targets)
        assert parts.device.type == "cuda"


def test_the_double_notices_a_tensor_of_the_host_and_a_wait(gpu: torch.device) -> None:
    there = torch.rand(3, device=gpu)
    with pytest.raises(RuntimeError, match="two different devices"):
        there + torch.rand(3)
    with pytest.raises(DataDependentOutputException):
        there.sum().item()
    with pytest.raises(Exception, match="nonzero"):
        there[there > 0.5]


def _moved(name: str, gpu: torch.device) -> Detector:
    """Return the detector on the fake GPU; it is built of real tensors, as building looks at values."""
    with unset_fake_temporarily():
        real = build_detector(name, nc=3)
    return real.to(gpu)
