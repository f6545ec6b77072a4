"""The parts of the training engine: schedule, optimizer groups, moving average, checkpoints, progress."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from starling.config.hyp import Hyp
from starling.core.errors import CheckpointError, DiskFull, UsageError
from starling.core.units import format_duration
from starling.device import select_compute
from starling.model.checkpoint import is_own_checkpoint, load_checkpoint, save_checkpoint
from starling.progress import Progress
from starling.training.optimizer import (
    BIASES,
    DECAYED,
    NORMS,
    ExponentialMovingAverage,
    Schedule,
    build_optimizer,
)
from starling.training.reporting.results import LOSSES, EpochRow, columns_of, write_results
from starling.training.setup.autobatch import fit_batch

NAN = math.nan


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_parameters_fall_into_biases_decayed_weights_and_norms() -> None:
    optimizer = build_optimizer(small_model(), "SGD", Hyp(), batch_size=16)
    sizes = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    assert sizes[BIASES] == [(4,), (4,)]
    assert sizes[DECAYED] == [(4, 3, 3, 3)]
    assert sizes[NORMS] == [(4,)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0005, 0.0]


@pytest.mark.parametrize(("batch_size", "scale"), [(16, 1.0), (64, 1.0), (128, 2.0), (24, 24 * 3 / 64)])
def test_weight_decay_is_scaled_by_the_images_of_a_step(batch_size: int, scale: float) -> None:
    optimizer = build_optimizer(small_model(), "AdamW", Hyp(), batch_size)
    assert optimizer.param_groups[DECAYED]["weight_decay"] == pytest.approx(0.0005 * scale)


def test_the_schedule_warms_up_and_then_falls_linearly() -> None:
    hyp = Hyp()
    schedule = Schedule(hyp, epochs=100, iterations_per_epoch=50, batch_size=16)
    optimizer = build_optimizer(small_model(), "SGD", hyp, 16)
    assert schedule.warmup_iterations == 150
    schedule.apply(optimizer, 0, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.8)
    schedule.apply(optimizer, 50, 2500)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.01 * (0.5 * 0.99 + 0.01))
    assert optimizer.param_groups[1]["momentum"] == pytest.approx(0.937)


def test_warm_up_lasts_a_hundred_iterations_at_least() -> None:
    assert Schedule(Hyp(), 10, 3, 16).warmup_iterations == 100
    assert Schedule(Hyp(warmup_epochs=0.0), 10, 3, 16).warmup_iterations == 0


def test_cosine_starts_at_one_and_ends_at_lrf() -> None:
    schedule = Schedule(Hyp(lrf=0.1), 10, 3, 16, cosine=True)
    assert schedule.factor(0) == pytest.approx(1.0)
    assert schedule.factor(5) == pytest.approx(0.55)
    assert schedule.factor(10) == pytest.approx(0.1)


def test_accumulation_ramps_up_to_the_nominal_batch() -> None:
    schedule = Schedule(Hyp(), 100, 50, 16)
    steps = [schedule.accumulate(i) for i in range(200)]
    assert steps[0] == 1
    assert steps[-1] == 4
    assert steps == sorted(steps)
    assert Schedule(Hyp(), 100, 50, 128).accumulate(1000) == 1


def test_the_moving_average_follows_its_formula_in_every_floating_state() -> None:
    model = small_model()
    average = ExponentialMovingAverage(model)
    before = {key: value.clone() for key, value in average.model.state_dict().items()}
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[1].running_mean.add_(2.0)
    average.update()
    decay = 0.9999 * (1 - math.exp(-1 / 2000))
    after = average.model.state_dict()
    torch.testing.assert_close(after["0.weight"], before["0.weight"] + (1 - decay))
    torch.testing.assert_close(after["1.running_mean"], before["1.running_mean"] + 2 * (1 - decay))


STATE = {"weights": torch.arange(6.0).view(2, 3), "epoch": 3, "rows": [[1.0, NAN]], "names": ["a", "b"]}


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"], STATE["weights"])  # type: ignore[arg-type]
    assert loaded["names"] == ["a", "b"]
    assert is_own_checkpoint(path)


def test_a_checkpoint_cut_or_flipped_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {**STATE, "more": torch.randn(2000)})
    whole = path.read_bytes()
    damaged = tmp_path / "damaged.pt"
    for position in range(0, len(whole), 997):
        damaged.write_bytes(whole[:position])
        with pytest.raises(CheckpointError, match=r"damaged\.pt"):
            load_checkpoint(damaged)
        flipped = bytearray(whole)
        flipped[position] ^= 0x40
        damaged.write_bytes(flipped)
        try:
            loaded = load_checkpoint(damaged)
        except CheckpointError:
            continue
        # A flip in the archive's padding or dates changes nothing that is read.
        assert torch.equal(loaded["more"], load_checkpoint(path)["more"])


def test_a_pickle_that_would_act_is_refused_and_does_not_act(tmp_path: Path) -> None:
    sentinel = tmp_path / "touched"

    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {sentinel}",)

    path = tmp_path / "evil.pt"
    torch.save({"format": "starling-1", "x": Malicious()}, path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not sentinel.exists()


def test_a_full_disk_keeps_the_old_checkpoint_and_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    before = path.read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskFull, match=r"last\.pt.*what was written before is intact"):
        save_checkpoint(path, {**STATE, "epoch": 4})
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["last.pt"]


def test_an_epoch_row_survives_its_list_and_its_csv_leaves_unknowns_empty(tmp_path: Path) -> None:
    row = EpochRow(2, (0.1, 0.2, 0.3), (NAN,) * 4, (NAN,) * 3, (0.01, 0.01, 0.01))  # type: ignore[arg-type]
    assert EpochRow.from_list(row.as_list()).train_losses == row.train_losses
    write_results(tmp_path / "results.csv", [row])
    header, line = (tmp_path / "results.csv").read_text().splitlines()
    assert header.split(",") == list(columns_of(LOSSES))
    assert line == "2,0.1,0.2,0.3,,,,,,,,0.01,0.01,0.01"
    assert "metrics/precision" not in row.values()


def test_a_log_gets_whole_lines_and_not_too_many() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(stream, clock=lambda: now[0])
    for second in range(25):
        now[0] = float(second)
        progress.show(lambda: "working")
    progress.say("done")
    assert stream.getvalue() == "working\nworking\ndone\n"


def test_a_terminal_gets_one_line_that_rewrites_itself() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = [0.0]
    stream = Terminal()
    progress = Progress(stream, clock=lambda: now[0])
    for second, text in ((1, "a long line"), (2, "short")):
        now[0] = float(second)
        progress.show(lambda text=text: text)
    progress.say("end")
    assert stream.getvalue() == "\ra long line\rshort      \rend  \n"


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0s"), (59, "59s"), (61, "1m01s"), (7500, "2h05m")])
def test_durations_read_well(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named_with_the_remedy() -> None:
    with pytest.raises(UsageError, match="no GPU is visible here; use one that is, or --device cpu"):
        select_compute("3", "auto")


def test_amp_can_be_turned_off() -> None:
    assert not select_compute("cpu", "off").bfloat16


@pytest.mark.parametrize(
    ("sizes", "used", "free", "batch"),
    [
        ([1, 2, 4], [3, 5, 9], 100, 39),  # 1 + 2 an image; 80 of 100
        ([1, 2, 4], [30, 50, 90], 20, 1),
        ([1], [5], 100, 16),
        ([1, 2], [5, 5], 100, 16),
    ],
)
def test_the_automatic_batch_fills_four_fifths_of_the_free_memory(
    sizes: list[int], used: list[int], free: int, batch: int
) -> None:
    assert fit_batch(sizes, used, free) == batch
