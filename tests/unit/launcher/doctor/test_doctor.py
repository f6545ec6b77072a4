"""What `doctor` makes of what it sees; the checks that need an engine are in tests/docker."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launcher.devices.inventory import Driver, Gpu, MigSlice
from launcher.doctor import engine_checks, host_checks, one_shot
from launcher.doctor.findings import Finding, as_lines, exit_code
from launcher.engines.base import Image
from launcher.hosts.this_machine import ThisMachine
from starling.core.units import GIB
from tests.conftest import PYTHON_PATH, REPOSITORY

H100 = Gpu(index=0, uuid="GPU-1a2b3c4d", name="NVIDIA H100", memory_bytes=80 * GIB)


def doctor(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STARLING_")}
    return subprocess.run(
        [sys.executable, "-m", "launcher", "doctor", *words],
        cwd=cwd,
        env={**clean, "PYTHONPATH": PYTHON_PATH, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_local_engine_is_well_here_and_nothing_is_made(tmp_path: Path) -> None:
    done = doctor("--engine", "local", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert done.returncode == document["exit_code"] == 0
    assert [check["check"] for check in document["checks"]] == [
        "trainer", "machine", "GPUs", "runs folder", "file system", "runs' disk", "MLflow",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_is_not_there_is_exit_5_with_remedies_and_the_rest_is_looked_at(
    tmp_path: Path,
) -> None:
    start = time.monotonic()
    done = doctor(cwd=tmp_path, DOCKER_HOST=f"unix://{tmp_path}/none")
    assert time.monotonic() - start < 5
    assert done.returncode == 5
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["failure", "socket"]
    assert "systemctl start docker" in lines[1]
    assert any(line.startswith("ok       runs folder") for line in lines)
    assert lines[-1].endswith("2 failures")


@pytest.mark.parametrize("gpu", ["all", "0,1", "-1", "", "GPU-"])
def test_a_gpu_to_try_is_one(gpu: str, tmp_path: Path) -> None:
    assert doctor("--gpu", gpu, cwd=tmp_path).returncode == 2


def test_a_failure_is_exit_5_and_a_warning_stops_nobody() -> None:
    ok, warning, failure = (Finding("x", status, "text", "remedy") for status in ("ok", "warning", "failure"))  # type: ignore[arg-type]
    assert [exit_code(found) for found in ([ok], [ok, warning], [failure, ok])] == [0, 0, 5]
    assert sum("-> remedy" in line for line in as_lines([ok, warning, failure])) == 2


def test_the_socket_names_the_group_that_may_use_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        path.chmod(0o660)
        assert engine_checks.check_socket(path).status == "ok"
        path.chmod(0o666)
        assert "chmod o-rw" in engine_checks.check_socket(path).remedy
        if os.getuid() == 0:
            path.chmod(0o660)
            os.chown(path, 0, 12)
            tmp_path.chmod(0o755)
            said = _as_nobody(f"print(engine_checks.check_socket(Path({str(path)!r})))", tmp_path)
            assert "status='failure'" in said
            assert "usermod -aG man $USER" in said


def _as_nobody(code: str, folder: Path) -> str:
    """Run a line as a user without rights, whose way to the folder is open."""
    for parent in (folder, *folder.parents):
        if parent != Path("/") and parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o011)
    head = "import os; from pathlib import Path; from launcher.doctor import engine_checks; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
    done = subprocess.run([sys.executable, "-c", head + code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("version", "status"),
    [("19.03.15", "failure"), ("20.10.24+dfsg1", "ok"), ("28.0.0", "ok"), ("20.9", "failure"), ("dev", "ok")],
)
def test_an_engine_that_is_too_old_is_told(version: str, status: str) -> None:
    assert engine_checks.check_version({"Version": version, "ApiVersion": "1.41"}).status == status


def test_limits_that_the_kernel_cannot_hold_are_told() -> None:
    whole = {"MemoryLimit": True, "SwapLimit": True, "PidsLimit": True, "CPUSet": True, "CgroupVersion": "2"}
    assert engine_checks.check_limits(whole).status == "ok"
    assert "swapaccount=1" in engine_checks.check_limits({**whole, "SwapLimit": False}).remedy
    assert "memory" in engine_checks.check_limits({**whole, "MemoryLimit": False}).text
    assert engine_checks.check_limits({**whole, "MemoryLimit": False}).status == "failure"


@pytest.mark.parametrize(("off", "status"), [(0, "ok"), (-3, "ok"), (86400, "warning"), (-60, "warning")])
def test_a_clock_that_is_off_is_told(off: int, status: str) -> None:
    there = datetime.fromtimestamp(1_000_000 + off, UTC).strftime("%Y-%m-%dT%H:%M:%S.123456789Z")
    assert engine_checks.check_clock({"SystemTime": there}, 1_000_000, 1_000_001).status == status
    assert engine_checks.check_clock({}, 0, 1).status == "ok"


@pytest.mark.parametrize(("free", "status"), [(0, "failure"), (5 * GIB, "warning"), (50 * GIB, "ok")])
def test_little_room_is_told_before_it_runs_out(free: int, status: str) -> None:
    assert engine_checks.judge_space("x", Path("/x"), free, "make room").status == status


def test_what_hands_out_gpus_is_looked_for_only_where_there_are_gpus() -> None:
    assert engine_checks.check_gpu_runtime({}, None).status == "ok"
    assert engine_checks.check_gpu_runtime({"Runtimes": {"nvidia": {}}}, (H100,)).status == "ok"
    assert (
        engine_checks.check_gpu_runtime({"DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}]}, (H100,)).status
        == "ok"
    )
    missing = engine_checks.check_gpu_runtime({"Runtimes": {"runc": {}}}, (H100,))
    assert (missing.status, "nvidia-ctk" in missing.remedy) == ("warning", True)


def test_a_card_without_its_driver_is_no_machine_without_gpus(tmp_path: Path) -> None:
    assert host_checks.check_gpus(None, remote=False, pci=tmp_path).text == host_checks.NO_GPU
    assert "NVIDIA H100" in host_checks.check_gpus((H100,), remote=False, pci=tmp_path).text
    for name, vendor, kind in (
        ("a", "0x10de", "0x030200"),
        ("b", "0x10de", "0x040300"),
        ("c", "0x8086", "0x030000"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    found = host_checks.check_gpus((), remote=False, pci=tmp_path)
    assert (found.status, found.text[0]) == ("failure", "1")


def test_a_broken_gpu_is_told_and_the_first_that_can_be_handed_out_is_tried() -> None:
    broken = Gpu(index=0, uuid="", name="", memory_bytes=0, problem="GPU is lost")
    sliced = Gpu(index=1, uuid="GPU-b", name="A100", memory_bytes=1, mig=True,
                 slices=(MigSlice(index=0, uuid="MIG-c", name="1g", memory_bytes=1),))  # fmt: skip
    empty = Gpu(index=1, uuid="GPU-b", name="A100", memory_bytes=1, mig=True)
    assert host_checks.check_gpus((broken, H100), remote=False).status == "failure"
    assert host_checks.first_usable((broken, empty, H100)) == H100.uuid
    assert host_checks.first_usable((sliced, H100)) == "MIG-c"
    assert host_checks.first_usable((broken, empty)) is host_checks.first_usable(()) is None


def test_a_driver_too_old_for_the_image_is_told() -> None:
    image = Image(name="starling", cuda="13.0")
    assert host_checks.check_driver_for(image, None) == []
    [old] = host_checks.check_driver_for(image, Driver(version="550.54", cuda=(12, 4)))
    assert (old.status, "580" in old.remedy) == ("failure", True)
    [new] = host_checks.check_driver_for(image, Driver(version="580.65", cuda=(13, 0)))
    assert (new.status, new.text) == ("ok", "580.65 serves CUDA 13.0; the image holds CUDA 13.0")


def test_the_runs_folder_is_written_and_locked_for_real(tmp_path: Path) -> None:
    found = host_checks.check_runs_folder(ThisMachine(), tmp_path)
    assert [(finding.check, finding.status) for finding in found][:2] == [
        ("runs folder", "ok"),
        ("file system", "ok"),
    ]
    assert list(tmp_path.iterdir()) == []
    assert host_checks.check_locks(Path("/proc")).status == "failure"
    assert host_checks.check_runs_folder(ThisMachine(), Path("/etc"))[0].status == "failure"


@pytest.mark.parametrize(
    ("mounts", "status"),
    [
        ({"/": "ext4"}, "ok"),
        ({"/": "ext4", "/data": "nfs4"}, "warning"),
        ({"/": "nfs", "/data": "xfs"}, "ok"),
        ({"/": "ext4", "/dat": "nfs"}, "ok"),
        ({"/": "ext4", "/data": "fuse.sshfs"}, "warning"),
        ({}, "ok"),
    ],
)
def test_a_network_file_system_is_told(mounts: dict[str, str], status: str) -> None:
    assert host_checks.check_file_system(Path("/data/runs"), mounts).status == status


@pytest.fixture
def server() -> Iterator[int]:
    """A server that answers /health, and nothing else, by a status of the path's choosing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(
                500 if "broken" in self.path else 200 if self.path.endswith("/health") else 404
            )
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made.server_port
        made.shutdown()


def test_the_tracking_server_is_asked(server: int) -> None:
    def look(address: str) -> Finding:
        return host_checks.check_tracking({"MLFLOW_TRACKING_URI": address})

    assert look("").status == look("sqlite:///x.db").status == "ok"
    assert look(f"http://me:s3cret@127.0.0.1:{server}/").text == f"http://me:***@127.0.0.1:{server}/: answers"
    assert "answers 500" in look(f"http://127.0.0.1:{server}/broken").text
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert "does not answer" in look(f"http://127.0.0.1:{closed.getsockname()[1]}").text
    named = look("http://no-such-name.invalid:5000")
    assert (named.status, "--network" in named.remedy) == ("warning", True)


@pytest.mark.parametrize(
    ("gpus", "status", "says"),
    [
        (("GPU 0: A",), "ok", "exactly one"),
        ((), "failure", "sees none"),
        (("GPU 0: A", "GPU 1: B"), "failure", "sees 2"),
    ],
)
def test_one_gpu_asked_for_is_one_gpu_seen(gpus: tuple[str, ...], status: str, says: str) -> None:
    sight = one_shot.Sight(
        trainer=True, runs=True, shm_bytes=one_shot.SHM, memory=str(one_shot.MEMORY), gpus=gpus
    )
    found = one_shot._gpus("0", sight)
    assert (found.status, says in found.text) == (status, True)
