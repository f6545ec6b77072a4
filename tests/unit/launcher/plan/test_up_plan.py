"""What `up` decides and refuses, from a request and facts that are written down: no engine, and no double for one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.devices.holders import GpuHolder
from launcher.devices.inventory import Driver, Machine
from launcher.engines.base import Image, ReplicaSpec, ReplicaState
from launcher.errors import EngineError, NameTaken
from launcher.hosts.access import PathState, ReadPath
from launcher.hosts.files import DiskSpace
from launcher.plan.changes import Changes, plan_changes
from launcher.plan.check import check
from launcher.plan.dry_run import document
from launcher.plan.facts import Access, Facts, Refusals, SecretFile
from launcher.plan.plan import Plan, make_plan, occupancy
from starling.core.errors import CheckpointError, DataError, UsageError
from starling.core.units import GIB
from tests.unit.launcher.plan.test_plan import FACTS, request_for

ENDINGS: dict[str, dict[str, Any]] = {
    "running": {"phase": "running"},
    "paused": {"phase": "paused"},
    "finished": {"phase": "exited", "exit_code": 0},
    "failed": {"phase": "exited", "exit_code": 3},
    "stopped": {"phase": "exited", "exit_code": 143},
    "created": {"phase": "created"},
}


def state(name: str, ending: str, spec: ReplicaSpec | None = None, **changes: Any) -> ReplicaState:
    """Return a replica of the fleet that is there, made from `spec`."""
    values = {"id": f"id of {name}", "fleet": "blood/search", "device": "gpu:1", **ENDINGS[ending]}
    return ReplicaState(name=name, plan=spec.public() if spec else {}, **{**values, **changes})


def messages(plan: Plan, facts: Facts) -> list[str]:
    return [str(problem) for problem in check(plan, facts)]


def planned(tmp_path: Path, facts: Facts = FACTS, **asked: object) -> tuple[Plan, list[str]]:
    """Return the plan, and what would stop it."""
    plan = make_plan(request_for(tmp_path, **asked), facts)
    return plan, messages(plan, facts)


# --- what becomes of the replicas that are there


def specs(tmp_path: Path, gpus: str = "1-2") -> tuple[ReplicaSpec, ...]:
    return make_plan(request_for(tmp_path, gpus=gpus), FACTS).replicas


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_runs_or_has_finished_stays_and_the_rest_is_started_again(ending: str, tmp_path: Path) -> None:
    first, second = specs(tmp_path)
    there = state(first.name, ending)
    changes = plan_changes([first, second], [there], recreate=False)
    if ending in ("running", "paused", "finished"):
        assert changes == Changes(keep=(there,), start=(second,))
    else:
        assert changes == Changes(dead=(there,), start=(first, second))
    assert changes.running == ((first.name,) if ending in ("running", "paused") else ())
    assert changes.finished == ((first.name,) if ending == "finished" else ())


def test_a_fleet_that_is_started_anew_is_stopped_whatever_its_replicas_do(tmp_path: Path) -> None:
    wanted = specs(tmp_path)
    there = tuple(state(f"r{number}", ending) for number, ending in enumerate(ENDINGS))
    assert plan_changes(wanted, there, recreate=True) == Changes(stop=there, start=wanted)


@pytest.mark.parametrize(
    ("ending", "recreate", "settled"),
    [
        ("running", True, True),
        ("finished", False, True),
        ("finished", True, False),
        ("stopped", False, False),
        ("created", False, False),
    ],
)
def test_only_replicas_that_will_not_be_started_are_settled(
    ending: str, recreate: bool, settled: bool, tmp_path: Path
) -> None:
    facts = replace(FACTS, existing=(state("x", ending),))
    found = occupancy(request_for(tmp_path, recreate=recreate), facts)
    assert (found.own, found.settled) == (("1",), ("1",) if settled else ())


# --- what stops a plan


def test_a_plan_that_nothing_stops_has_no_problem(tmp_path: Path) -> None:
    plan, wrong = planned(tmp_path, gpus="0-2")
    assert (len(plan.replicas), plan.changes.start, wrong) == (3, plan.replicas, [])


def test_everything_that_is_wrong_is_told_in_the_order_in_which_a_reader_can_act_on_it(
    tmp_path: Path,
) -> None:
    mount = tmp_path / "blood"
    facts = replace(
        FACTS,
        holders=(GpuHolder("somebody", ("0",)),),
        refusals=Refusals(
            network=EngineError("network"),
            trainer=EngineError("trainer"),
            gpu_runtime=EngineError("runtime"),
            names=NameTaken("name"),
        ),
        image=Image(name="starling", cuda="13.0"),
        driver=Driver("570", (12, 8)),
        disk=DiskSpace(GIB // 2),
        secrets=(SecretFile(variable="STARLING_STUDY_PASSWORD_FILE", path=Path("gone"), is_file=False),),
        access=Access(
            runs=(PathState(tmp_path / "runs", 5, 5, 0o40700),),
            reads=(ReadPath(DataError, mount, (PathState(mount, 5, 5, 0o40700),)),),
        ),
    )
    _, wrong = planned(tmp_path, facts, gpus="0-1", memory_bytes=100 * GIB, shm_bytes=101 * GIB, user="0:0")
    heads = [
        "STARLING_STUDY_PASSWORD_FILE=gone: must be", "--gpus 0-1: GPU 0 is held by somebody",
        "--memory 100 GB: 2 replicas need 200 GB", "--shm 101 GB", "--user 0:0", "network", "trainer", "runtime",
        "image starling holds CUDA 13.0", "--runs", "--runs", f"{mount}: replicas run as 0:0", "name",
    ]  # fmt: skip
    assert [message[: len(head)] for message, head in zip(wrong, heads, strict=True)] == heads


def test_where_no_device_can_be_chosen_the_rest_is_told_all_the_same(tmp_path: Path) -> None:
    missing = EngineError("no image")
    facts = replace(FACTS, image=None, refusals=Refusals(image=missing, network=EngineError("network")))
    plan, wrong = planned(tmp_path, facts, gpus="9", memory_bytes=1000 * GIB)
    assert plan.replicas == ()
    assert wrong[0] == "no image"
    assert wrong[1].startswith("--gpus 9: no GPU 9 on this machine")
    assert wrong[2:] == ["network"]


def test_an_image_that_is_to_be_built_may_be_missing(tmp_path: Path) -> None:
    facts = replace(FACTS, image=None, refusals=Refusals(image=EngineError("no image")))
    assert planned(tmp_path, facts)[1] == ["no image"]
    plan, wrong = planned(tmp_path, facts, build=True)
    assert wrong == []
    assert document(plan, ())["notes"] == ["starling:latest would be built first"]


def test_a_fleet_that_differs_is_refused_and_shown_unless_it_is_to_be_started_anew(tmp_path: Path) -> None:
    [spec] = specs(tmp_path, "1")
    there = state(spec.name, "running", spec)
    facts = replace(FACTS, existing=(there,))
    assert planned(tmp_path, facts)[1] == []
    changed = {"memory_bytes": spec.memory_bytes // 2}
    _, [wrong] = planned(tmp_path, facts, **changed)
    assert wrong.startswith("fleet blood/search exists and differs:\n  blood-search-gpu1: memory: ")
    assert planned(tmp_path, facts, recreate=True, **changed)[1] == []
    without_image = replace(facts, image=None)
    assert planned(tmp_path, without_image, build=True, **changed)[1] == [], "what it would be is not known"


def test_a_variable_that_a_living_replica_has_with_another_value_is_a_difference(tmp_path: Path) -> None:
    passed = {"MLFLOW_RUN": "s3cret"}
    [spec] = make_plan(request_for(tmp_path, passed=passed), FACTS).replicas
    there = state(spec.name, "running", spec)
    had = replace(FACTS, existing=(there,), environments={there.id: {"MLFLOW_RUN": "s3cret"}})
    assert planned(tmp_path, had, passed=passed)[1] == []
    other = replace(had, environments={there.id: {"MLFLOW_RUN": "other"}})
    _, [wrong] = planned(tmp_path, other, passed=passed)
    assert "MLFLOW_RUN: has another value (not shown)" in wrong
    assert "s3cret" not in wrong + repr(other)


def test_a_held_gpu_is_shared_by_force_with_a_note(tmp_path: Path) -> None:
    facts = replace(FACTS, holders=(GpuHolder("somebody", ("1",), remedy="kill 7"),))
    _, [wrong] = planned(tmp_path, facts)
    assert "held by somebody; choose others (free: 0,2-5), end what holds it: kill 7" in wrong
    plan, wrong_by_force = planned(tmp_path, facts, force=True)
    assert (plan.notes, wrong_by_force) == (("GPU 1 is held by somebody; shared as --force says",), [])


def test_permissions_that_are_not_judged_stop_nothing(tmp_path: Path) -> None:
    secret = SecretFile(
        variable="STARLING_STUDY_PASSWORD_FILE",
        path=tmp_path,
        is_file=True,
        state=PathState(tmp_path, 5, 5, 0o100600),
    )
    judged = replace(
        FACTS, secrets=(secret,), access=Access(runs=(PathState(tmp_path, 1000, 1000, 0o40700),))
    )
    _, [wrong] = planned(tmp_path, judged)
    assert wrong.startswith(f"STARLING_STUDY_PASSWORD_FILE={tmp_path}: replicas run as 1000:1000")
    assert planned(tmp_path, replace(judged, access=None))[1] == []


def test_weights_that_lead_out_of_their_mount_are_the_error_of_weights(tmp_path: Path) -> None:
    weights = tmp_path / "kept"
    folder = PathState(weights / "models", 1000, 1000, 0o40755, leads_to=Path("/elsewhere"))
    reads = (ReadPath(CheckpointError, weights, (folder,)),)
    runs = (PathState(tmp_path / "runs", 1000, 1000, 0o40700),)
    facts = replace(FACTS, access=Access(reads=reads, runs=runs))
    plan = make_plan(request_for(tmp_path), facts)
    [problem] = check(plan, facts)
    assert type(problem) is CheckpointError
    assert "leads to /elsewhere, which replicas do not see" in str(problem)


def test_a_plan_is_a_function_of_request_and_facts(tmp_path: Path) -> None:
    request = request_for(tmp_path, gpus="0-3", memory_bytes=2 * GIB)
    assert make_plan(request, FACTS) == make_plan(request, FACTS)
    smaller = replace(FACTS, machine=Machine(cores=(0,), memory_bytes=4 * GIB))
    assert [type(problem) for problem in check(make_plan(request, smaller), smaller)] == [UsageError]
