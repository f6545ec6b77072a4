"""What NVML tells of GPUs, slices and processes, over a double of `pynvml` (tests/doubles): no GPU is seen here."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml as real
import pytest

from launcher.devices.inventory import DESKTOP_BYTES, Gpu, GpuProcess, MigSlice, read_gpus
from starling.core.units import GIB
from tests.doubles import pynvml as double

Describe = Callable[..., None]


def gpu(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "uuid": f"GPU-000{number}",
        "name": "H100",
        "memory": 80 * GIB,
        "mig": None,
        "slices": [],
        **changes,
    }


def part(number: int, **changes: Any) -> dict[str, Any]:
    return {"uuid": f"MIG-000{number}", "name": "MIG 1g.10gb", "memory": 10 * GIB, **changes}


@pytest.fixture
def describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Describe:
    """Put the double in NVML's place, over the GPUs given."""
    monkeypatch.setitem(sys.modules, "pynvml", double)
    monkeypatch.setenv("STARLING_NVML_DOUBLE", str(tmp_path / "gpus.json"))

    def write(*gpus: dict[str, Any], **machine: Any) -> None:
        (tmp_path / "gpus.json").write_text(json.dumps({"gpus": gpus, **machine}))

    return write


def test_the_double_has_nothing_that_the_real_module_lacks() -> None:
    names = [name for name in vars(double) if name.startswith(("nvml", "NVML"))]
    assert len(names) > 20
    for name in names:
        ours, theirs = getattr(double, name), getattr(real, name)
        if isinstance(ours, type):
            assert issubclass(theirs, real.NVMLError) == issubclass(ours, double.NVMLError), name
        elif callable(ours):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), (
                name
            )
        else:
            assert ours == theirs, name
    for name, (code, text) in double._CODES.items():
        assert str(getattr(real, f"NVMLError_{name}")()) == text
        assert getattr(real, f"NVMLError_{name}")().value == code


def test_gpus_come_in_order_with_names_memory_and_what_computes_on_them(describe: Describe) -> None:
    describe(gpu(0), gpu(1, processes=[{"pid": 7, "memory": 5 * GIB}, {"pid": 8, "memory": None}]))
    assert read_gpus() == (
        Gpu(0, "GPU-0000", "H100", 80 * GIB),
        Gpu(1, "GPU-0001", "H100", 80 * GIB, processes=(GpuProcess(7, 5 * GIB), GpuProcess(8, None))),
    )


def test_a_desktop_holds_nothing_and_a_simulator_that_draws_too_does(describe: Describe) -> None:
    compositor, browser, simulator = (
        {"pid": 1, "memory": 2 * GIB},
        {"pid": 2, "memory": DESKTOP_BYTES - 1},
        {"pid": 3, "memory": 20 * GIB},
    )
    describe(gpu(0, graphics=[compositor, browser, simulator], processes=[browser, simulator]))
    [found] = read_gpus() or ()
    assert found.processes == (GpuProcess(3, 20 * GIB),)


def test_slices_are_listed_by_number_with_their_own_processes(describe: Describe) -> None:
    slices = [part(0), None, part(2, processes=[{"pid": 9, "memory": GIB}])]
    describe(gpu(0, mig=True, slices=slices), gpu(1, mig=False))
    sliced, whole = read_gpus() or ()
    assert sliced.mig
    assert not whole.mig
    assert sliced.slices == (
        MigSlice(0, "MIG-0000", "MIG 1g.10gb", 10 * GIB),
        MigSlice(2, "MIG-0002", "MIG 1g.10gb", 10 * GIB, (GpuProcess(9, GIB),)),
    )


@pytest.mark.parametrize(("driver", "seen"), [("old", 1), ("ancient", 0)])
def test_an_older_driver_tells_what_it_can(describe: Describe, driver: str, seen: int) -> None:
    describe(gpu(0, processes=[{"pid": 7, "memory": 1}]), driver=driver)
    [found] = read_gpus() or ()
    assert len(found.processes) == seen


def test_a_gpu_that_fell_off_the_bus_is_told_and_hides_no_other(describe: Describe) -> None:
    describe(gpu(0, error="GpuIsLost"), gpu(1))
    lost, other = read_gpus() or ()
    assert (lost.index, lost.problem) == (0, "GPU is lost")
    assert (other.index, other.problem) == (1, "")


def test_a_gpu_that_shares_the_machines_memory_has_no_figure_of_its_own(describe: Describe) -> None:
    describe(gpu(0, memory=None))
    assert read_gpus() == (Gpu(0, "GPU-0000", "H100", 0),)


@pytest.mark.parametrize(
    "fault", [{"init": "DriverNotLoaded"}, {"init": "LibraryNotFound"}, {"count": "Unknown"}]
)
def test_no_answer_is_no_list_of_gpus(describe: Describe, fault: dict[str, str]) -> None:
    describe(gpu(0), **fault)
    assert read_gpus() is None
    describe()
    assert read_gpus() == (), "an answer with no GPU is another matter"


def test_no_module_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_gpus() is None
