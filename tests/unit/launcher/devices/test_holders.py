"""Who holds a GPU, out of an engine's inspect, `/proc` and NVML's list of processes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from launcher.devices.devices import Device, replica_gpus
from launcher.devices.holders import EVERY, GpuHolder
from launcher.devices.inventory import Gpu, GpuProcess, MigSlice
from launcher.engines.base import ReplicaSpec, ReplicaState
from launcher.engines.docker.gpu_containers import container_holder, gpu_ids
from launcher.engines.labels import labels
from launcher.engines.local.local import LocalEngine
from launcher.fleet.holders import find_holders, local_replicas
from launcher.hosts.processes import find_process, user_name
from launcher.hosts.this_machine import TcpHost, ThisMachine
from starling.core.units import GIB

ID = "0123456789abcdef" * 4
OTHER_ID = "f" * 64
ME = os.getuid()


def inspected(*environment: str, status: str = "running", name: str = "job", **host: Any) -> dict[str, Any]:
    """Return what an engine's inspect says of a container, as far as it is read."""
    return {
        "Id": ID,
        "Name": f"/{name}",
        "State": {"Status": status},
        "Config": {"Image": "pytorch", "Labels": {}, "Env": list(environment)},
        "HostConfig": {"Runtime": "runc", "DeviceRequests": None, "Devices": [], **host},
    }


def request(**changes: Any) -> dict[str, Any]:
    return {"Driver": "", "Count": 0, "DeviceIDs": None, "Capabilities": [["gpu"]], "Options": {}, **changes}


# --- containers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "ids"),
    [
        (request(Count=-1), (EVERY,)),  # --gpus all
        (request(Count=2), ("0", "1")),  # --gpus 2
        (request(DeviceIDs=["3", "GPU-1"]), ("3", "GPU-1")),
        (request(DeviceIDs=["0:1"]), ("0:1",)),
        (request(Driver="nvidia", Count=-1), (EVERY,)),
        (request(Driver="cdi", Capabilities=None, DeviceIDs=["nvidia.com/gpu=2", "vendor.com/nic=1"]), ("2",)),
        (request(Driver="cdi", Capabilities=None, DeviceIDs=["nvidia.com/gpu=all"]), (EVERY,)),
        (request(Count=-1, Capabilities=[["gpu", "compute", "utility"]]), (EVERY,)),
        (request(Count=-1, Capabilities=[["gpu", "utility"]]), ()),  # a monitor
        (request(Driver="amd", Count=-1), ()),
        (request(Count=-1, Capabilities=[["tpu"]]), ()),
    ],
)  # fmt: skip
def test_a_device_request_says_which_gpus(asked: dict[str, Any], ids: tuple[str, ...]) -> None:
    assert gpu_ids(inspected(DeviceRequests=[asked])) == ids


@pytest.mark.parametrize(
    ("value", "runtime", "ids"),
    [
        ("all", "nvidia", (EVERY,)),
        ("all", "runc", ()),  # every image of CUDA says so, with or without a GPU
        ("1,GPU-3", "nvidia", ("1", "GPU-3")),
        ("1,GPU-3", "runc", ("1", "GPU-3")),
        ("nvidia.com/gpu=1", "nvidia-cdi", ("1",)),
        ("runtime.nvidia.com/gpu=1", "nvidia", ("1",)),
        ("void", "nvidia", ()),
        ("none", "nvidia", ()),
        ("", "nvidia", ()),
    ],
)
def test_the_runtimes_variable_says_which_gpus(value: str, runtime: str, ids: tuple[str, ...]) -> None:
    assert gpu_ids(inspected(f"NVIDIA_VISIBLE_DEVICES={value}", Runtime=runtime)) == ids


def test_a_device_request_counts_before_the_images_variable() -> None:
    given = inspected(
        "NVIDIA_VISIBLE_DEVICES=all", DeviceRequests=[request(DeviceIDs=["1"])], Runtime="nvidia"
    )
    assert gpu_ids(given) == ("1",)
    monitor = inspected("NVIDIA_DRIVER_CAPABILITIES=utility", DeviceRequests=[request(Count=-1)])
    assert gpu_ids(monitor) == ()


def test_a_device_file_is_a_gpu_and_the_drivers_own_files_are_not() -> None:
    files = [
        {"PathOnHost": path} for path in ("/dev/nvidia2", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/fuse")
    ]
    assert gpu_ids(inspected(Devices=files)) == ("2",)


def spec(runs: Path, name: str = "x-y-gpu2", **changes: Any) -> ReplicaSpec:
    values: dict[str, Any] = {"name": name, "fleet": "x/y", "device": Device("gpu", "2", ("GPU-2",)), "image": "",
                              "image_id": "", "command": (sys.executable, "-c", "import time; time.sleep(60)"),
                              "environment": {}, "runs": runs}  # fmt: skip
    return ReplicaSpec(**{**values, **changes})


@pytest.mark.parametrize(
    ("owner", "status", "holder", "remedy"),
    [
        (7, "running", "x-y-gpu2 of fleet x/y", "launcher stop x/y"),
        (7, "created", "x-y-gpu2 of fleet x/y (created, never started)", "launcher kill-all x/y"),
        (987654, "paused", "x-y-gpu2 of fleet x/y of uid 987654", ""),
    ],
)
def test_a_replica_is_named_with_its_fleet_and_its_user(
    tmp_path: Path, owner: int, status: str, holder: str, remedy: str
) -> None:
    found = inspected(name="x-y-gpu2", status=status, DeviceRequests=[request(DeviceIDs=["GPU-2"])])
    found["Config"]["Labels"] = labels(spec(tmp_path), owner)
    assert container_holder(found, 7) == GpuHolder(holder, ("GPU-2",), ID, remedy)


def test_another_container_is_named_with_its_image_while_it_has_its_devices(tmp_path: Path) -> None:
    asked = [request(Count=-1)]
    who = "container job (0123456789ab, image pytorch)"
    for status in ("running", "paused", "restarting"):
        assert container_holder(inspected(status=status, DeviceRequests=asked), 7) == GpuHolder(
            who, (EVERY,), ID
        )
    for status in ("created", "exited", "dead"):
        assert container_holder(inspected(status=status, DeviceRequests=asked), 7) is None
    forged = inspected(DeviceRequests=asked)
    forged["Config"]["Labels"] = labels(spec(tmp_path), 7)  # on a container of another name
    assert container_holder(forged, 7) == GpuHolder(who, (EVERY,), ID)


def test_a_strangers_words_steer_no_terminal_and_no_shell(tmp_path: Path) -> None:
    found = inspected(name="x-y-gpu2", DeviceRequests=[request(DeviceIDs=["2"])])
    found["Config"]["Labels"] = labels(spec(tmp_path, fleet="x/\x1b[2Jy; rm -rf ~"), 7)
    holder = container_holder(found, 7)
    assert holder is not None
    assert holder.name == "x-y-gpu2 of fleet x/\\x1b[2Jy; rm -rf ~"
    assert holder.remedy == "launcher stop 'x/\\x1b[2Jy; rm -rf ~'"


# --- processes -----------------------------------------------------------------------------------------------


def write_process(
    proc: Path,
    pid: int,
    *,
    cgroup: str = "0::/user.slice\n",
    parent: int = 1,
    command: Sequence[str] = ("python", "x.py"),
    uid: int = ME,
) -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "status").write_text(f"Name:\tpython\nPid:\t{pid}\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\nGid:\t0\n")
    (folder / "cgroup").write_text(cgroup)
    (folder / "stat").write_text(f"{pid} (a (odd) name) S {parent} {pid} {pid} 0 -1" + " 0" * 44)
    (folder / "cmdline").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in command))


@pytest.mark.parametrize(
    ("cgroup", "containers"),
    [
        (f"12:memory:/docker/{ID}\n11:cpu:/docker/{ID}\n0::/system.slice/containerd.service\n", (ID,)),
        (f"0::/system.slice/docker-{ID}.scope\n", (ID,)),
        (f"0::/machine.slice/libpod-{ID}.scope/container\n", (ID,)),
        (f"0::/kubepods.slice/kubepods-pod1f.slice/cri-containerd-{ID}.scope\n", (ID,)),
        (f"0::/docker/{OTHER_ID}/docker/{ID}\n", (OTHER_ID, ID)),
        ("0::/user.slice/user-1000.slice/session-2.scope\n", ()),
        ("9:name=systemd:/\n0::/\n", ()),
    ],
)
def test_a_process_is_in_the_container_that_its_cgroup_names(
    tmp_path: Path, cgroup: str, containers: tuple[str, ...]
) -> None:
    write_process(tmp_path, 42, cgroup=cgroup)
    process = find_process(42, tmp_path)
    assert process is not None
    assert process.containers == containers


def test_a_process_is_described_for_people_without_secrets_or_escapes(tmp_path: Path) -> None:
    write_process(tmp_path, 40, parent=1)
    write_process(
        tmp_path,
        42,
        parent=40,
        command=["python", "\x1b[2Jt.py", "--study", "postgresql://u:hunter2@db/s", "x" * 99],
    )
    process = find_process(42, tmp_path)
    assert process is not None
    assert process.user == user_name(ME)
    assert process.command.startswith("python \\x1b[2Jt.py --study postgresql://u:***@db/s xxx")
    assert len(process.command) == 80
    assert process.ancestors == (40, 1)
    assert find_process(99, tmp_path) is None


class OneEngine:
    """An engine that has nothing but containers with GPUs."""

    name = "docker"

    def __init__(self, *holders: GpuHolder, remote: bool = False) -> None:
        self._holders = holders
        self.host = TcpHost() if remote else ThisMachine()

    def gpu_holders(self) -> Sequence[GpuHolder]:
        return self._holders


def occupants(
    engine: OneEngine, proc: Path, *gpus: Gpu, own: Sequence[ReplicaState] = ()
) -> list[tuple[str, tuple[str, ...]]]:
    found = find_holders(engine, gpus, {state.id for state in own}, proc=proc)  # type: ignore[arg-type]
    return [(holder.name, holder.gpus) for holder in found]


def busy(*pids: int, memory: int | None = GIB) -> Gpu:
    return Gpu(1, "GPU-1", "H100", 80 * GIB, processes=tuple(GpuProcess(pid, memory) for pid in pids))


def test_a_foreign_process_is_named_with_its_user_command_and_memory(tmp_path: Path) -> None:
    write_process(tmp_path, 42)
    write_process(tmp_path, 43, cgroup=f"0::/docker/{OTHER_ID}\n")
    user = user_name(ME)
    assert occupants(OneEngine(), tmp_path, busy(42, 43, 44, memory=11 * GIB), busy(42, memory=None)) == [
        (f"process 42 of {user} (python x.py, 11 GB)", ("GPU-1",)),
        (f"process 43 of {user} in container ffffffffffff (python x.py, 11 GB)", ("GPU-1",)),
        ("process 44 (not visible from here, 11 GB)", ("GPU-1",)),
        (f"process 42 of {user} (python x.py)", ("GPU-1",)),
    ]


def test_a_process_in_a_container_is_the_containers_even_on_a_gpu_it_was_not_given(tmp_path: Path) -> None:
    write_process(tmp_path, 42, cgroup=f"0::/system.slice/docker-{ID}.scope\n")
    privileged = GpuHolder("container job", (), ID)
    assert ("container job", ("GPU-1",)) in occupants(OneEngine(privileged), tmp_path, busy(42))


def test_a_process_on_a_slice_holds_that_slice(tmp_path: Path) -> None:
    write_process(tmp_path, 42)
    part = MigSlice(0, "MIG-0", "1g", GIB, (GpuProcess(42),))
    gpu = Gpu(1, "GPU-1", "H100", 80 * GIB, mig=True, slices=(part,))
    assert [ids for _, ids in occupants(OneEngine(), tmp_path, gpu)] == [("MIG-0",)]


def test_the_fleets_own_containers_and_their_processes_are_not_in_its_way(tmp_path: Path) -> None:
    write_process(tmp_path, 42, cgroup=f"0::/docker/{ID}\n")
    own = ReplicaState(
        id=ID, name="x-y-gpu1", fleet="x/y", device="gpu:1", phase="running", plan={"uuids": ["GPU-1"]}
    )
    engine = OneEngine(GpuHolder("x-y-gpu1 of fleet x/y", ("GPU-1",), ID))
    assert occupants(engine, tmp_path, busy(42)) != []
    assert occupants(engine, tmp_path, busy(42), own=[own]) == []


def test_a_remote_engines_gpus_are_not_looked_for_on_this_machine(tmp_path: Path) -> None:
    write_process(tmp_path, 42)
    far = GpuHolder("container far", ("1",), ID)
    assert occupants(OneEngine(far, remote=True), tmp_path, busy(42)) == [("container far", ("1",))]


def test_a_replicas_gpus_are_its_plans_uuids_or_its_labels_numbers() -> None:
    assert replica_gpus("gpu:0-1", {"uuids": ["GPU-0", "GPU-1"]}) == ("GPU-0", "GPU-1")
    assert replica_gpus("gpu:0", {"uuids": ["GPU-x"]}) == ("GPU-x",)
    assert replica_gpus("gpu:3", {}) == ("3",)
    assert replica_gpus("gpu:0,2-4", {}) == ("0", "2", "3", "4")
    assert replica_gpus("gpu:GPU-8f-1-2", {}) == ("GPU-8f-1-2",)
    assert replica_gpus("gpu:2:1", {"uuids": "forged"}) == ("2:1",)
    assert replica_gpus("cpu:0-1", {"uuids": []}) == ()


# --- local replicas, which are real here ------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> Any:
    """Yield a running replica of the local engine, and the pid of its trainer's child, in a session of its own."""
    runs = tmp_path / "there" / "runs"
    runs.mkdir(parents=True)
    code = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True); "
        "print(child.pid, flush=True); child.wait()"
    )
    engine = LocalEngine(runs, ME)
    replica_id = engine.create(spec(runs, command=(sys.executable, "-c", code)))
    engine.start(replica_id)
    pid = int(next(engine.logs(replica_id, follow=True)))
    yield SimpleNamespace(engine=engine, id=replica_id, pid=pid, runs=runs)
    engine.remove(replica_id)


def test_a_local_replica_of_another_runs_folder_is_found_by_its_supervisor(local: Any) -> None:
    place = f"--engine local --runs {local.runs}"
    mine = GpuHolder("x-y-gpu2 of fleet x/y", ("GPU-2",), local.id, f"launcher stop {place} x/y")
    assert mine in local_replicas().values()
    record = local.runs / ".launcher" / "x-y-gpu2.json"
    kept = json.loads(record.read_text())
    for forged in (
        "{}",
        '{"labels": 3}',
        '{"labels": {"starling.plan": 3}}',
        '{"labels": {"starling.plan": "\\ud800"}}',
        "[",
    ):
        record.write_text(forged)
        [holder] = [holder for holder in local_replicas().values() if "x-y-gpu2" in holder.name]
        assert holder.name.startswith("local replica x-y-gpu2 (process ")
        assert holder.gpus == ()
    record.write_text(json.dumps(kept))


def test_another_users_local_replica_is_theirs_and_nothing_to_end_for_the_caller(tmp_path: Path) -> None:
    supervisor = "/home/alice/starling/launcher/engines/supervisor.py"
    exit_file = tmp_path / "runs" / ".launcher" / "x-y-gpu2.exit.json"
    exit_file.parent.mkdir(parents=True)
    record = {"id": "r", "labels": labels(spec(tmp_path / "runs"), 987654)}
    (exit_file.parent / "x-y-gpu2.json").write_text(json.dumps(record))
    proc = tmp_path / "proc"
    write_process(
        proc, 40, command=["python", "-I", supervisor, str(exit_file), "log", "", "--", "train"], uid=987654
    )
    write_process(
        proc, 41, command=["vi", supervisor, str(exit_file)]
    )  # which is no supervisor of a replica here
    assert local_replicas(proc)[40] == GpuHolder("x-y-gpu2 of fleet x/y of uid 987654", ("GPU-2",), "r")
    (exit_file.parent / "x-y-gpu2.json").unlink()
    unknown = "local replica x-y-gpu2 of uid 987654 (process 40)"
    assert local_replicas(proc)[40] == GpuHolder(unknown, (), "pid 40")
    write_process(proc, 50, parent=40, uid=987654)
    assert occupants(OneEngine(), proc, busy(50))[-1] == (unknown, ("GPU-1",))


def test_a_process_on_a_gpu_is_the_local_replicas_that_started_it(local: Any) -> None:
    assert ("x-y-gpu2 of fleet x/y", ("GPU-1",)) in occupants(OneEngine(), Path("/proc"), busy(local.pid))
    own = local.engine.list()
    assert occupants(OneEngine(), Path("/proc"), busy(local.pid), own=own) == [
        item for item in occupants(OneEngine(), Path("/proc")) if "x/y" not in item[0]
    ]


def test_a_removed_local_replica_takes_all_its_processes_along(local: Any) -> None:
    child = psutil.Process(local.pid)
    local.engine.remove(local.id)
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(5)  # raises when it is still there
