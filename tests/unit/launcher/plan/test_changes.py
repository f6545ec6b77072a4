"""A changed `up` says what would change, as a person would say it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.devices.devices import Device
from launcher.engines.base import Mount, ReplicaSpec, ReplicaState
from launcher.plan.changes import differences
from starling.core.units import GIB

SPEC = ReplicaSpec(
    name="b-s-gpu1",
    fleet="b/s",
    device=Device("gpu", "1"),
    image="starling",
    image_id="sha256:" + "a" * 64,
    command=("python", "train.py", "--epochs", "10", "--exist-ok"),
    environment={"OMP_NUM_THREADS": "8"},
    passed={"MLFLOW_RUN": "one"},
    mounts=(Mount(source="/runs", target="/usr/src/app/runs", read_only=False),),
    runs=Path("/runs"),
    memory_bytes=20 * GIB,
)


def told(spec: ReplicaSpec, *more: ReplicaSpec) -> list[str]:
    state = ReplicaState(
        id="1", name=SPEC.name, fleet=SPEC.fleet, device="gpu:1", phase="running", plan=SPEC.public()
    )
    return differences([spec, *more], [state], {"1": {**SPEC.environment, **SPEC.passed}})


def test_the_same_again_differs_in_nothing() -> None:
    assert told(SPEC) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"command": ("python", "train.py", "--epochs", "20", "--exist-ok")}, "command: --epochs 10 -> --epochs 20"),
        ({"command": (*SPEC.command, "--cos-lr")}, "command: (nothing) -> --cos-lr"),
        ({"memory_bytes": 10 * GIB}, "memory: 20 GB -> 10 GB"),
        ({"memory_bytes": 20 * GIB + 1}, f"memory: {20 * GIB} bytes -> {20 * GIB + 1} bytes"),
        ({"image_id": "sha256:" + "b" * 64}, f"image: built again or tagged anew, {'a' * 12} -> {'b' * 12}"),
        ({"user": "1000:1000"}, "user: (unset) -> 1000:1000"),
        ({"environment": {"OMP_NUM_THREADS": "4"}}, "OMP_NUM_THREADS: 8 -> 4"),
        ({"environment": {}}, "OMP_NUM_THREADS: 8 -> (unset)"),
        ({"passed": {"MLFLOW_RUN": "one", "TOKEN": "x"}}, "TOKEN: passed now"),
        ({"passed": {}}, "MLFLOW_RUN: no longer passed"),
        ({"passed": {"MLFLOW_RUN": "s3cret"}}, "MLFLOW_RUN: has another value (not shown)"),
        (
            {"mounts": (*SPEC.mounts, Mount(source="/data", target="/data"))},
            "mount /data (read-only): added",
        ),
        ({"mounts": ()}, "mount /runs at /usr/src/app/runs (writable): dropped"),
    ],
)  # fmt: skip
def test_a_change_is_one_line_in_words(change: dict[str, object], words: str) -> None:
    assert told(replace(SPEC, **change)) == [f"b-s-gpu1: {words}"]  # type: ignore[arg-type]


def test_replicas_that_come_and_go_are_named() -> None:
    other = replace(SPEC, name="b-s-gpu2", device=Device("gpu", "2"))
    assert told(SPEC, other) == ["b-s-gpu2: new"]
    assert told(other) == ["b-s-gpu1: no longer wanted", "b-s-gpu2: new"]
