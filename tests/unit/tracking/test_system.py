"""Samples of the machine: real ones of this one, and of GPUs that a double of NVML tells of."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from starling.tracking.process_identity import ProcessIdentity
from starling.tracking.system import EVERY_S, Sample, SystemSampler
from tests.doubles import pynvml as double

SECOND = {"uuid": "GPU-1", "name": "H100", "memory": 8 * 10**9, "used": 2 * 10**9, "load": 75, "milliwatts": 350_000,
          "celsius": 61}  # fmt: skip
FIRST = {**SECOND, "uuid": "GPU-0"}
MeasureWith = Callable[..., Sample]


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MeasureWith:
    """Return a function that takes the first sample of a machine with the GPUs it is given."""
    file = tmp_path / "nvml.json"
    monkeypatch.setitem(sys.modules, "pynvml", double)
    monkeypatch.setenv("STARLING_NVML_DOUBLE", str(file))

    def first_sample(*gpus: dict[str, Any]) -> Sample:
        file.write_text(json.dumps({"gpus": gpus}))
        now = 0.0
        sampler = SystemSampler(ProcessIdentity.of(os.getpid()), clock=lambda: now)
        assert sampler.sample() is None
        work_until = time.process_time() + 0.1
        while time.process_time() < work_until:
            pass
        now = 1.0
        taken = sampler.sample()
        now = EVERY_S
        assert sampler.sample() is None
        assert taken is not None
        return taken

    return first_sample


def of_gpu(sample: Sample, index: int) -> Sample:
    start = f"system/gpu_{index}_"
    return {name.removeprefix(start): value for name, value in sample.items() if name.startswith(start)}


def test_each_gpus_memory_load_power_and_heat_are_told_under_the_names_that_mlflow_groups(
    measure: MeasureWith,
) -> None:
    sample = measure(FIRST, {**SECOND, "load": 5})
    assert of_gpu(sample, 0) == {
        "memory_usage_megabytes": 2000, "memory_usage_percentage": 25, "utilization_percentage": 75,
        "power_usage_watts": 350, "temperature_celsius": 61,
    }  # fmt: skip
    assert of_gpu(sample, 1)["utilization_percentage"] == 5


def test_a_gpu_that_is_lost_keeps_no_other_from_being_told(measure: MeasureWith) -> None:
    sample = measure({**FIRST, "error": "GpuIsLost"}, SECOND)
    assert (of_gpu(sample, 0), of_gpu(sample, 1)["utilization_percentage"]) == ({}, 75)


def test_what_a_gpu_does_not_tell_is_left_out(measure: MeasureWith) -> None:
    assert of_gpu(measure({"uuid": "MIG", "name": "slice", "memory": 10**9}), 0).keys() == {
        "memory_usage_megabytes",
        "memory_usage_percentage",
    }


def test_the_first_sample_measures_the_second_before_it(measure: MeasureWith) -> None:
    sample = measure()
    assert sample["system/trainer_cpu_percentage"] > 0
    assert sample["system/cpu_utilization_percentage"] > 0
    assert sample["system/trainer_memory_megabytes"] > 10
    assert 0 < sample["system/system_memory_usage_percentage"] < 100
