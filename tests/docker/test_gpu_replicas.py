"""GPU replicas on a real engine without a GPU: a double stands in for NVIDIA's runtime hook.

The double is an executable named `nvidia-container-runtime-hook` that does nothing. With it on the engine's PATH, a
device request succeeds and the container is told its device; that shows what the launcher asks for, never that a GPU
works. The engine is a private one, in a network namespace of its own, so that the machine's engine is left alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher.devices.devices import Device
from launcher.engines.base import ReplicaSpec
from launcher.engines.docker.docker import DockerEngine
from launcher.hosts.this_machine import ThisMachine
from tests.conftest import PYTHON_PATH, REPOSITORY
from tests.contract.conftest import base_image
from tests.docker.conftest import missing
from tests.trainer_double import build_double
from tests.waiting import wait_until

pytestmark = pytest.mark.docker

TRAINER = """
import os, sys, time
print("device", os.environ["NVIDIA_VISIBLE_DEVICES"], "args", sys.argv[1:], flush=True)
time.sleep(600)
"""
IMAGE = "starling-gpu-double:test"


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a private engine with the double on its PATH, and yield its address."""
    if os.geteuid() != 0 or not (shutil.which("dockerd") and shutil.which("unshare")):
        missing("a private engine needs root, dockerd and unshare")
    base = base_image()
    # A socket's path is at most 107 characters long, so not below pytest's own folders.
    folder = Path(tempfile.mkdtemp(prefix="starling-", dir="/tmp"))
    hook = folder / "bin" / "nvidia-container-runtime-hook"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\nexit 0\n")
    hook.chmod(0o755)
    address = f"unix://{folder}/docker.sock"
    command = ["unshare", "--net", "dockerd", "-H", address, "--data-root", f"{folder}/data", "--exec-root",
               f"{folder}/exec", "--pidfile", f"{folder}/pid", "--bridge=none", "--iptables=false"]  # fmt: skip
    with open(folder / "log", "w") as log:
        engine = subprocess.Popen(
            command,
            env={**os.environ, "PATH": f"{hook.parent}:{os.environ['PATH']}"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait(address, engine, folder / "log")
        _make_image(base, address, folder)
        yield address
    finally:
        ours = docker(address, "ps", "-aq").stdout.split()
        if ours:
            docker(address, "rm", "-f", *ours)
        engine.terminate()
        engine.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def docker(address: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *words],
        env={**os.environ, "DOCKER_HOST": address},
        capture_output=True,
        text=True,
        check=False,
    )


def _wait(address: str, engine: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(120):
        if docker(address, "info").returncode == 0:
            return
        if engine.poll() is not None:
            break
        time.sleep(0.5)
    missing(f"the private engine does not start: {log.read_text()[-500:]}")


def _make_image(base: str, address: str, folder: Path) -> None:
    """Copy the base over from the machine's engine and put a stand-in for the trainer on it."""
    with subprocess.Popen(["docker", "save", base], stdout=subprocess.PIPE) as saved:
        subprocess.run(
            ["docker", "-H", address, "load", "-q"], stdin=saved.stdout, check=True, capture_output=True
        )
    build_double(folder / "context", base, IMAGE, TRAINER, address)


def launcher(address: str, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": PYTHON_PATH, "DOCKER_HOST": address, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_main_jobs_line_gives_five_detached_containers_with_one_gpu_each(
    socket: str, tmp_path: Path
) -> None:
    blood = tmp_path / "blood"
    (blood / "images" / "train").mkdir(parents=True)
    (blood / "bccd.yaml").write_text("path: .\ntrain: images/train\nval: images/train\nnames: [RBC]\n")

    up = launcher(
        socket, tmp_path, "up", "--gpus", "1-5", "--memory", "256m", "--image", IMAGE, "--network", "none", "--",
        "--data", "blood/bccd.yaml", "--weights", "", "--cfg", "yolov5n.yaml", "--img", "320", "--epochs", "10",
        "--project", "blood", "--name", "search", "--evolve", "60",
    )  # fmt: skip
    assert up.returncode == 0, up.stderr

    replicas = json.loads(launcher(socket, tmp_path, "status", "--json").stdout)["replicas"]
    assert [replica["device"] for replica in replicas] == [f"gpu:{number}" for number in range(1, 6)]
    assert {replica["phase"] for replica in replicas} == {"running"}
    for number, replica in enumerate(replicas, start=1):
        wait_until(lambda replica=replica: docker(socket, "logs", replica["id"]).stdout)
        [line] = docker(socket, "logs", replica["id"]).stdout.splitlines()
        assert line.startswith(f"device {number} ")
        assert f"'--data', '{blood}/bccd.yaml'" in line, "one command line means the same inside and out"
        [inspected] = json.loads(docker(socket, "inspect", replica["id"]).stdout)
        host = inspected["HostConfig"]
        assert host["DeviceRequests"] == [
            {"Driver": "", "Count": 0, "DeviceIDs": [str(number)], "Capabilities": [["gpu", "compute", "utility"]],
             "Options": host["DeviceRequests"][0]["Options"]}
        ]  # fmt: skip
        assert host["Memory"] == host["MemorySwap"] == 256 << 20
        assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in inspected["Config"]["Env"]
        assert not inspected["Config"]["Tty"]

    assert launcher(socket, tmp_path, "kill-all", "--yes").returncode == 0
    assert docker(socket, "ps", "-aq").stdout == ""


class Machine:
    """The private engine on a machine with four GPUs, as NVML's double tells."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address, folder
        tag = uuid.uuid4().hex[:8]  # no other test's replicas are on these
        self.uuids = [f"GPU-{tag}-{n}" for n in range(4)]
        self.gpus: list[dict[str, Any]] = [
            {"uuid": self.uuids[n], "name": "H100", "memory": 2**36, "processes": []} for n in range(4)
        ]
        self.describe()

    def describe(self) -> None:
        (self.folder / "gpus.json").write_text(json.dumps({"gpus": self.gpus}))

    def up(self, name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return launcher(
            self.address, self.folder, "up", *words, "--memory", "64m", "--image", IMAGE, "--network", "none", "--settle", "0",
            "--runs", name, "--", "--project", "p", "--name", name, "--batch", "12", **self.variables, **environment,
        )  # fmt: skip

    @property
    def variables(self) -> dict[str, str]:
        return {
            "PYTHONPATH": f"{REPOSITORY / 'tests' / 'doubles'}:{PYTHON_PATH}",
            "STARLING_NVML_DOUBLE": str(self.folder / "gpus.json"),
        }

    def run(self, name: str, *words: str) -> str:
        """Start somebody's container, which sleeps."""
        command = ["run", "-d", "--name", name, "--network", "none", *words, IMAGE, "sleep", "60"]
        done = docker(self.address, *command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def inspect(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(docker(self.address, "inspect", name).stdout)[0]
        return found


@pytest.fixture
def machine(socket: str, tmp_path: Path) -> Iterator[Machine]:
    """Yield the machine with nothing on it, and leave nothing on it."""
    yield Machine(socket, tmp_path)
    found = docker(socket, "ps", "-aq").stdout.split()
    if found:
        docker(socket, "rm", "-f", *found)


def test_gpus_are_requested_by_uuid_and_named_by_number(machine: Machine) -> None:
    assert machine.up("a", "--gpus", "1").returncode == 0
    assert machine.inspect("p-a-gpu1")["HostConfig"]["DeviceRequests"][0]["DeviceIDs"] == [machine.uuids[1]]
    assert machine.inspect("p-a-gpu1")["Config"]["Labels"]["starling.device"] == "gpu:1"
    up = machine.up("b", "--gpus", "free", "--ddp")
    assert up.returncode == 0, up.stderr
    together = machine.inspect("p-b-gpu0_2-3")
    assert together["HostConfig"]["DeviceRequests"][0]["DeviceIDs"] == [machine.uuids[n] for n in (0, 2, 3)]
    assert together["HostConfig"]["Memory"] == 3 * 64 << 20
    assert together["Args"][-2:] == ["--device", "0,1,2"]
    again = machine.up("b", "--gpus", "free", "--ddp")
    assert "already running: p-b-gpu0_2-3" in again.stdout, again.stderr
    assert "GPU 0,2-3" in launcher(machine.address, machine.folder, "status").stdout


def test_every_kind_of_holder_is_named_before_anything_starts(machine: Machine) -> None:
    assert machine.up("a", "--gpus", "0", SUDO_UID="54321", SUDO_GID="54321").returncode == 0
    machine.run("given", "--gpus", f'"device={machine.uuids[1]}"')
    machine.run("told", "--env", "NVIDIA_VISIBLE_DEVICES=2")
    machine.run("image", "--env", "NVIDIA_VISIBLE_DEVICES=all")  # as any image of CUDA says, with runc
    sneaky = machine.run("sneaky")  # it got at a GPU some other way, as a privileged container can
    pid = machine.inspect(sneaky)["State"]["Pid"]  # real, and so are its cgroups
    machine.gpus[3]["processes"] = [{"pid": pid, "memory": 2**30}]
    machine.describe()

    up = machine.up("b", "--gpus", "all")
    assert up.returncode == 2
    lines = up.stderr.splitlines()
    assert lines[0] == "error: --gpus all: 4 devices are held"
    for line, words in zip(
        lines[1:5],
        ["p-a-gpu0 of fleet p/a of uid 54321", "container given (", "container told (", f"container sneaky ({sneaky[:12]}, "],
        strict=True,
    ):  # fmt: skip
        assert words in line
    assert not (machine.folder / "b").exists()
    assert docker(machine.address, "ps", "-aq", "--filter", "name=p-b").stdout == ""

    everything = machine.run("everything", "--gpus", "all")
    assert f"container everything ({everything[:12]}, image {IMAGE})" in machine.up("b", "--gpus", "1").stderr
    forced = machine.up("b", "--gpus", "1", "--force")
    assert forced.returncode == 0, forced.stderr
    assert "shared as --force says" in forced.stdout
    cpu = machine.up("c", "--cpu", "1")
    assert cpu.returncode == 0, "a replica without a GPU asks nobody"


def test_the_local_engine_sees_containers_too_and_one_that_was_never_started_counts(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", machine.address)
    spec = ReplicaSpec(
        name="p-left-gpu3", fleet="p/left", device=Device("gpu", "3", (machine.uuids[3],)), image=IMAGE, image_id="",
        command=("sleep", "60"), environment={}, runs=machine.folder, memory_bytes=64 << 20, network="none",
    )  # fmt: skip
    DockerEngine(os.getuid(), ThisMachine()).create(spec)
    up = machine.up("b", "--gpus", "3", "--engine", "local")
    assert up.returncode == 2
    assert "GPU 3 is held by p-left-gpu3 of fleet p/left (created, never started)" in up.stderr
    assert "launcher kill-all p/left" in up.stderr


def test_of_two_ups_at_once_on_one_gpu_one_wins_and_the_other_names_it(machine: Machine) -> None:
    with ThreadPoolExecutor() as pool:
        ups = list(pool.map(lambda name: machine.up(name, "--gpus", "2"), ("a", "b")))
    assert sorted(up.returncode for up in ups) == [0, 2], [up.stderr for up in ups]
    winner, loser = ("a", ups[1]) if ups[0].returncode == 0 else ("b", ups[0])
    assert f"GPU 2 is held by p-{winner}-gpu2 of fleet p/{winner}" in loser.stderr
    assert docker(machine.address, "ps", "-a", "--format", "{{.Names}}").stdout.split() == [
        f"p-{winner}-gpu2"
    ]


SMI = """#!/bin/sh
# A double of NVIDIA's: lists what the container was told it has, as a real one would.
echo "$NVIDIA_VISIBLE_DEVICES" | tr , '\\n' | while read -r id; do echo "GPU 0: Double (UUID: GPU-double-$id)"; done
"""


def test_doctor_asks_for_exactly_one_gpu_and_tells_what_the_container_sees(
    socket: str, tmp_path: Path
) -> None:
    """The image's own `nvidia-smi` is a double, beside the hook: this shows what is asked for, not that a GPU works."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "Dockerfile").write_text(f"FROM {IMAGE}\nCOPY nvidia-smi /usr/bin/\n")
    build = ("docker", "-H", socket, "build", "-q", "-t", "starling-smi:test", str(tmp_path))
    subprocess.run(build, env={**os.environ, "DOCKER_BUILDKIT": "0"}, check=True, capture_output=True)
    (tmp_path / "runs").mkdir()
    os.chown(tmp_path / "runs", 10001, 10001)  # as `up` leaves it

    done = launcher(socket, tmp_path, "doctor", "--json", "--image", "starling-smi:test", "--gpu", "3")
    checks = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, done.stdout
    assert checks["GPU inside"]["text"].endswith("exactly one: GPU 0: Double (UUID: GPU-double-3)")
    assert (
        checks["trainer"]["status"]
        == checks["container"]["status"]
        == checks["runs inside"]["status"]
        == "ok"
    )
    assert checks["GPUs"]["text"] == "no GPU here; CPU replicas work"
    assert docker(socket, "ps", "-aq").stdout == "", "the container is removed"
    assert list((tmp_path / "runs").iterdir()) == []

    without = launcher(socket, tmp_path, "doctor", "--image", IMAGE, "--gpu", "3")
    assert without.returncode == 5
    assert "asked for GPU 3, the container sees none" in without.stdout
