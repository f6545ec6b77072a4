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
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.contract.conftest import base_image
from tests.docker.conftest import missing

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
    context = folder / "context"
    context.mkdir()
    (context / "train.py").write_text(TRAINER)
    (context / "Dockerfile").write_text(
        f"FROM {base}\nCOPY train.py /usr/src/app/train.py\nENV PATH=/usr/src/app:$PATH\n"
    )
    python = context / "python"
    python.write_text('#!/bin/sh\nexec python3 "$@"\n')
    python.chmod(0o755)
    with open(context / "Dockerfile", "a") as file:
        file.write("COPY python /usr/src/app/python\n")
    built = subprocess.run(
        ["docker", "-H", address, "build", "-q", "-t", IMAGE, str(context)],
        env={**os.environ, "DOCKER_BUILDKIT": "0"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr


def launcher(address: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "DOCKER_HOST": address},
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
