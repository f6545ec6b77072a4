"""Layouts are read strictly, detectors are what their layout says, and weights land where they belong."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from starling.config.shipped import SHIPPED
from starling.core.errors import CheckpointError, ConfigError
from starling.model.blocks import BottleneckCSP, Conv, Focus, GhostConv, TransformerBlock
from starling.model.detector import build_detector
from starling.model.head import Detect
from starling.model.layout import read_layout
from starling.model.weights import load_weights

TINY: dict[str, Any] = {
    "depth_multiple": 0.33,
    "width_multiple": 0.25,
    "anchors": [[10, 13, 16, 30], [30, 61, 62, 45]],
    "backbone": [
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 3, "C3", [64]],
        [-1, 1, "Conv", [64, 3, 2]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],
        [-1, 1, "C3", [64, False]],
        [[6, 3], 1, "Detect", ["nc", "anchors"]],
    ],
}


def tiny(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(TINY), **changes}


def with_row(part: str, index: int, row: Any) -> dict[str, Any]:
    layout = tiny()
    layout[part][index] = row
    return layout


def test_strides_anchors_and_channels_follow_from_the_layout() -> None:
    detector = build_detector(tiny(), nc=2)
    assert detector.stride.tolist() == [4.0, 8.0]
    assert detector.head.anchors[1].tolist() == [[30 / 8, 61 / 8], [62 / 8, 45 / 8]]
    first = detector.model[0]
    assert isinstance(first, Conv)
    assert first.conv.out_channels == 8


def test_training_gives_raw_levels_and_evaluation_also_decodes_them() -> None:
    detector = build_detector(tiny(), nc=2)
    images = torch.rand(2, 3, 32, 64)
    raw = detector.train()(images)
    assert [tuple(level.shape) for level in raw] == [(2, 2, 8, 16, 7), (2, 2, 4, 8, 7)]
    decoded, raw = detector.eval()(images)
    assert decoded.shape == (2, 2 * 8 * 16 + 2 * 4 * 8, 7)
    assert decoded[..., 4:].min() >= 0
    assert decoded[..., 4:].max() <= 1


def test_a_zero_prediction_decodes_to_its_cell_centre_and_its_anchor() -> None:
    head = Detect(1, torch.tensor([[[12.0, 20.0]]]), strides=[8.0], channels=[4])
    decoded = head.decode([torch.zeros(1, 1, 2, 3, 6)])
    assert decoded[0, 5].tolist() == [20.0, 12.0, 12.0, 20.0, 0.5, 0.5]


def test_decoding_stays_in_float32_for_half_precision_predictions() -> None:
    head = Detect(1, torch.tensor([[[10.0, 10.0]]]), strides=[8.0], channels=[4])
    assert head.decode([torch.zeros(1, 1, 2, 2, 6, dtype=torch.bfloat16)]).dtype == torch.float32


def test_head_starts_with_rare_objects_and_even_classes() -> None:
    detector = build_detector(tiny(), nc=3)
    convolution = detector.head.m[1]
    assert isinstance(convolution, torch.nn.Conv2d)
    assert convolution.bias is not None
    bias = convolution.bias.detach().view(2, 8)
    assert bias[:, 4].tolist() == pytest.approx([math.log(8 / (640 / 8) ** 2)] * 2)
    assert bias[0, 5:].tolist() == pytest.approx([math.log(0.6 / (3 - 0.99999))] * 3)


def test_larger_anchors_go_to_larger_strides_whatever_order_they_come_in() -> None:
    turned = build_detector(tiny(), nc=1, anchors=[[30, 61, 62, 45], [10, 13, 16, 30]])
    assert torch.equal(turned.head.anchors, build_detector(tiny(), nc=1).head.anchors)


def test_a_number_of_anchors_gives_that_many_a_level_and_can_be_built_again() -> None:
    detector = build_detector(tiny(), nc=1, anchors=5.0)
    assert detector.head.anchors.shape == (2, 5, 2)
    again = build_detector(detector.layout, nc=detector.layout["nc"])
    assert torch.equal(again.head.anchors, detector.head.anchors)


def test_fused_copy_answers_alike_and_leaves_the_original_alone() -> None:
    torch.manual_seed(0)
    detector = build_detector(tiny(), nc=2)
    detector.train()(torch.rand(4, 3, 32, 32))  # statistics other than the initial ones
    images = torch.rand(1, 3, 32, 32)
    entries = list(detector.state_dict())
    fused = detector.fused()
    torch.testing.assert_close(fused(images)[0], detector.eval()(images)[0], atol=1e-3, rtol=1e-4)
    assert not any(".bn." in name for name in fused.state_dict())
    assert list(detector.state_dict()) == entries


def test_an_activation_belongs_to_one_detector_alone() -> None:
    leaky = build_detector(tiny(activation="nn.LeakyReLU(0.1)"), nc=1)
    plain = build_detector(tiny(), nc=1)
    kinds = [{type(m.act).__name__ for m in d.modules() if isinstance(m, Conv)} for d in (leaky, plain)]
    assert kinds == [{"LeakyReLU"}, {"SiLU"}]


def test_a_detector_on_the_meta_device_has_sizes_without_numbers() -> None:
    with torch.device("meta"):
        detector = build_detector("yolov5n6", nc=80)
    assert detector.count_parameters() == 3246940
    assert detector.stride.tolist() == [8, 16, 32, 64]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (with_row("backbone", 2, [-1, 3, "C33", [64]]), "did you mean 'C3'"),
        (with_row("backbone", 2, [-1, 3, "os.system", ["true"]]), "unknown module"),
        (with_row("backbone", 2, [-1, 3, "C3", ["nc"]]), "takes whole numbers"),
        (with_row("backbone", 2, [-1, 3, "C3", []]), "takes 1 to 2 args"),
        (with_row("backbone", 2, [-1, 3, "C3"]), "from, number, module, args"),
        (with_row("backbone", 2, [7, 3, "C3", [64]]), "rows above"),
        (with_row("backbone", 2, [-1, 0, "C3", [64]]), "between 1 and 100"),
        (with_row("head", 1, [[-1, 3], 1, "Concat", [1]]), "strides"),
        (with_row("head", 0, [-1, 1, "nn.Upsample", ["None", 2, "bilinear"]]), "nearest"),
        (with_row("head", 3, [-1, 1, "Conv", [8]]), "must be Detect"),
        (with_row("backbone", 2, [-1, 1, "SPP", [64, [4]]]), "odd kernels"),
        (with_row("backbone", 2, [-1, 1, "SPP", [64, 5]]), "list of kernels"),
        (with_row("backbone", 2, [-1, 1, "SPP", [64.5, [5]]]), "SPP takes channels"),
        (with_row("backbone", 2, [-1, 1, "nn.ZeroPad2d", [0, 1, 0, 1]]), "left, right, above, below"),
        (with_row("backbone", 2, [-1, 1, "nn.MaxPool2d", [2, 0]]), "do not fit"),
        (with_row("backbone", 2, [-1, 1, "GhostConv", [64, 1, 0]]), "at least 1"),
        (with_row("backbone", 0, [-1, 2, "Focus", [32, 3]]), "stands once"),
        (with_row("backbone", 0, [-1, 1, "Focus", [32, 3, 1, 1, 5]]), "do not fit"),
        (tiny(csp_activation="nn.Tanh()"), "must be one of"),
        (tiny(anchors=[[10, 13]]), "1 rows for the 2 levels"),
        (tiny(anchors=[[10, 13], [10]]), "pairs"),
        (tiny(width_multiple=0), "width_multiple"),
        (tiny(activation="__import__('os')"), "must be one of"),
        (tiny(widht_multiple=1), "did you mean 'width_multiple'"),
        ({key: value for key, value in TINY.items() if key != "head"}, "missing"),
    ],
)
def test_a_layout_that_cannot_work_says_what_and_where(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_detector(layout, nc=2)


@pytest.mark.parametrize("nc", [0, -1, True, 2.0])
def test_a_detector_needs_a_whole_number_of_classes(nc: Any) -> None:
    with pytest.raises(ConfigError, match="nc"):
        build_detector(tiny(), nc=nc)


@pytest.mark.parametrize("path", sorted((SHIPPED / "layouts").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_layout_builds(path: Path) -> None:
    with torch.device("meta"):
        detector = build_detector(path, nc=1)
    assert detector.layout["backbone"] == read_layout(path)["backbone"]


@pytest.mark.parametrize(
    "name",
    [*(f"yolov5-{kind}" for kind in ("p2", "p34", "p6", "p7", "fpn", "bifpn", "panet")),
     *("yolov5s-ghost", "yolov5s-transformer", "yolov5s-LeakyReLU", "yolov3", "yolov3-spp", "yolov3-tiny")],
)  # fmt: skip
def test_every_kind_of_layout_learns_answers_and_fuses(name: str) -> None:
    torch.manual_seed(0)
    layout = {
        **read_layout(SHIPPED / "layouts" / f"{name}.yaml"),
        "width_multiple": 0.06,
        "depth_multiple": 0.1,
    }
    detector = build_detector(layout, nc=3).train()
    side = 2 * int(detector.stride.max())
    images = torch.rand(2, 3, side, side)
    raw = detector(images)
    cells = [tuple(level.shape) for level in raw]
    assert cells == [(2, 3, side // int(s), side // int(s), 8) for s in detector.stride]
    sum(level.square().mean() for level in raw).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    with torch.no_grad():
        decoded = detector.eval()(images)[0]
        assert decoded.shape == (2, sum(3 * h * w for _, _, h, w, _ in cells), 8)
        torch.testing.assert_close(detector.fused()(images)[0], decoded, atol=1e-2, rtol=1e-3)


def test_images_are_multiples_of_the_deepest_stride_even_where_the_head_stops_above_it() -> None:
    layout = {**read_layout(SHIPPED / "layouts" / "yolov5-p34.yaml"), "width_multiple": 0.06}
    detector = build_detector(layout, nc=1)
    assert detector.stride.tolist() == [8, 16]
    assert detector.image_multiple == 32
    detector(torch.rand(2, 3, 64, 96))


def test_half_of_a_ghost_convolution_is_derived_from_the_other_half() -> None:
    ghost = GhostConv(4, 6, kernel=3, stride=2).eval()
    x = torch.rand(1, 4, 8, 8)
    y = ghost(x)
    assert y.shape == (1, 6, 4, 4)
    assert torch.equal(y[:, :3], ghost.cv1(x))
    assert torch.equal(y[:, 3:], ghost.cv2(y[:, :3]))
    assert ghost.cv2.conv.groups == 3


def test_focus_folds_squares_of_cells_into_channels_and_convolves() -> None:
    torch.manual_seed(0)
    focus = Focus(3, 5, kernel=3).eval()
    x = torch.rand(2, 3, 8, 12)
    folded = torch.empty(2, 12, 4, 6)
    for row in range(4):
        for column in range(6):
            for place, (down, right) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
                cells = x[:, :, 2 * row + down, 2 * column + right]
                folded[:, 3 * place : 3 * place + 3, row, column] = cells
    assert torch.equal(focus(x), focus.conv(folded))
    assert next(iter(focus.state_dict())) == "conv.conv.weight"


def test_focus_is_a_convolution_of_twice_the_kernel_and_stride_2() -> None:
    torch.manual_seed(0)
    focus, x = Focus(3, 5, kernel=3).eval(), torch.rand(1, 3, 16, 16)
    weight = torch.zeros(5, 3, 6, 6)
    for place, (down, right) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        weight[:, :, down::2, right::2] = focus.conv.conv.weight[:, 3 * place : 3 * place + 3]
    whole = torch.nn.functional.conv2d(x, weight, stride=2, padding=2)
    torch.testing.assert_close(focus(x), focus.conv.act(focus.conv.bn(whole)))


def test_the_older_cross_stage_block_normalises_both_of_its_ways_together() -> None:
    torch.manual_seed(0)
    block = BottleneckCSP(6, 8, number=2).train()
    block(torch.rand(4, 6, 5, 5))  # statistics other than the initial ones
    block.eval()
    x = torch.rand(1, 6, 5, 5)
    deep = torch.einsum("oihw,bixy->boxy", block.cv3.weight, block.m(block.cv1(x)))
    short = torch.einsum("oihw,bixy->boxy", block.cv2.weight, x)
    joined = torch.cat((deep, short), dim=1)
    mean, variance = (t.view(1, -1, 1, 1) for t in (block.bn.running_mean, block.bn.running_var))
    normal = (joined - mean) / (variance + 1e-3).sqrt()
    torch.testing.assert_close(block(x), block.cv4(normal * normal.sigmoid()))


def test_a_layout_of_2020_has_the_strides_of_its_rows_and_its_own_activations() -> None:
    layout = tiny(activation="nn.Hardswish()", csp_activation="nn.LeakyReLU(0.1)")
    layout["backbone"][0] = [-1, 1, "Focus", [32, 3]]
    layout["backbone"][2] = [-1, 3, "BottleneckCSP", [64]]
    detector = build_detector(layout, nc=2)
    assert detector.stride.tolist() == [4, 8]
    csp = detector.model[2]
    assert isinstance(csp, BottleneckCSP)
    assert [type(block.act).__name__ for block in (csp, csp.cv1)] == ["LeakyReLU", "Hardswish"]
    images = torch.rand(2, 3, 32, 64)
    sum(level.square().mean() for level in detector.train()(images)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    fused = detector.fused()
    torch.testing.assert_close(fused(images)[0], detector.eval()(images)[0], atol=1e-3, rtol=1e-4)


def test_attention_lets_every_cell_see_every_other() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(8)
    x = torch.rand(1, 8, 3, 4, requires_grad=True)
    block(x)[0, 0, 0, 0].backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(dim=(0, 1)) > 0).all()


def test_weights_of_the_same_layout_all_load() -> None:
    source, target = build_detector(tiny(), nc=2), build_detector(tiny(), nc=2)
    report = load_weights(target, source.state_dict())
    assert not report.left_out
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_fine_tuning_with_other_classes_keeps_the_fresh_head_and_names_it() -> None:
    source, target = build_detector(tiny(), nc=80), build_detector(tiny(), nc=2)
    head = target.head.m[0].weight.clone()
    report = load_weights(target, source.state_dict(), partial=True)
    assert report.wrong_shape == (
        "model.7.m.0.weight",
        "model.7.m.0.bias",
        "model.7.m.1.weight",
        "model.7.m.1.bias",
    )
    assert "model.7.m.0.weight" in report.describe()
    assert torch.equal(target.head.m[0].weight, head)
    assert torch.equal(target.state_dict()["model.0.conv.weight"], source.state_dict()["model.0.conv.weight"])


def test_unfitting_weights_raise_and_change_nothing() -> None:
    source, target = build_detector(tiny(), nc=80), build_detector(tiny(), nc=2)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointError, match=r"last\.pt does not fit.*model\.7\.m\.0\.weight"):
        load_weights(target, source.state_dict(), source="last.pt")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), target.state_dict().values(), strict=True))


def test_weights_of_another_layout_raise_even_where_parts_may_be_missing() -> None:
    wide = build_detector(tiny(width_multiple=1.0), nc=2)
    with pytest.raises(CheckpointError, match="another layout"):
        load_weights(build_detector(tiny(), nc=2), wide.state_dict(), partial=True)


def test_excluded_tensors_are_left_alone() -> None:
    source = build_detector(tiny(), nc=2, anchors=[[5, 5, 6, 6], [50, 50, 60, 60]])
    target = build_detector(tiny(), nc=2)
    load_weights(target, source.state_dict(), exclude=("anchors",))
    assert target.head.anchors[0, 0].tolist() == [10 / 4, 13 / 4]
