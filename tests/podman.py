"""A Podman service of the tests' own: storage, network settings and CDI devices apart from the machine's.

A double stands in for GPUs: CDI devices that set a variable and hold no device. It shows what reaches the container,
never that a GPU works.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

GPU_DOUBLES = ("0", "3", "GPU-5f2a7c11")


class PodmanService:
    """`podman system service` in a mount namespace of its own, with one image; `address` is its socket's."""

    def __init__(self, image: str) -> None:
        # A socket's path is at most 107 characters long, so not below pytest's own folders.
        self._folder = Path(tempfile.mkdtemp(prefix="starling-podman-", dir="/tmp"))
        self.address = f"unix://{self._folder}/podman.sock"
        self._store = ["--root", f"{self._folder}/store", "--runroot", f"{self._folder}/run",
                       "--tmpdir", f"{self._folder}/tmp", "--cgroup-manager", "cgroupfs"]  # fmt: skip
        (self._folder / "cdi.json").write_text(json.dumps(_gpu_doubles()))
        (self._folder / "containers.conf").write_text(_settings())
        self._log = open(self._folder / "log", "w")  # noqa: SIM115 (closed in remove)
        # What is on the namespace's own mounts is gone with its last process, the images' thousands of files too.
        script = (
            "mount -t tmpfs run /run && mkdir /run/cdi && cp cdi.json /run/cdi/ "
            '&& mkdir store && mount -t tmpfs store store && exec podman "$@"'
        )
        service = [*self._store, "system", "service", "--time=0", self.address]
        self._process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script, "podman", *service],
            cwd=self._folder,
            env={**os.environ, "CONTAINERS_CONF": f"{self._folder}/containers.conf"},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._wait()
        self._import(image)

    def _import(self, image: str) -> None:
        """Copy an image over from the Docker engine, without what no test needs."""
        left_out = [f"--exclude=./{name}" for name in ("dev", "proc", "sys", "usr/share", "var", "tmp")]
        copy = ["docker", "run", "--rm", "--network", "none", image, "tar", "-C", "/", *left_out, "-c", "."]
        with subprocess.Popen(copy, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as files:
            imported = self.docker("import", "-", image, stdin=files.stdout)
        assert imported.returncode == 0, imported.stderr

    def docker(self, *words: str, stdin: object = None) -> subprocess.CompletedProcess[str]:
        """Run Docker's own client against it."""
        return subprocess.run(
            ["docker", *words],
            env={**os.environ, "DOCKER_HOST": self.address},
            stdin=stdin,  # type: ignore[arg-type]
            capture_output=True,
            text=True,
            check=False,
        )

    def podman(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run Podman's own client on the same storage."""
        return subprocess.run(
            ["nsenter", "--mount", "--target", str(self._process.pid), "podman", *self._store, *words],
            env={**os.environ, "CONTAINERS_CONF": f"{self._folder}/containers.conf"},
            capture_output=True,
            text=True,
            check=False,
        )

    def remove(self) -> None:
        """End what runs in it, then it, and leave nothing behind."""
        ours = self.docker("ps", "-aq").stdout.split()
        if ours:
            self.docker("rm", "-f", *ours)
        os.killpg(self._process.pid, signal.SIGKILL)  # asked gently, it waits for its clients
        self._process.wait(30)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while not (self._folder / "podman.sock").exists() or self.docker("version").returncode:
            if self._process.poll() is not None or time.monotonic() > deadline:
                missing(f"Podman's service does not start: {(self._folder / 'log').read_text()[-500:]}")
            time.sleep(0.1)


def _gpu_doubles() -> dict[str, object]:
    devices = [{"name": name, "containerEdits": {"env": [f"GPU_DOUBLE={name}"]}} for name in GPU_DOUBLES]
    return {"cdiVersion": "0.4.0", "kind": "nvidia.com/gpu", "devices": devices}


def _settings() -> str:
    """Return containers.conf: no limit above this process's own, which a root without CAP_SYS_RESOURCE cannot raise."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    processes = min(
        resource.getrlimit(resource.RLIMIT_NPROC)[1] % 2**64,
        int(Path("/proc/sys/kernel/pid_max").read_text()),
    )
    return (
        f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]\n'
        '[engine]\nlock_type = "file"\n'
    )


def missing(what: str) -> None:
    """Skip the test for want of `what`, or fail it where Podman is required."""
    if os.environ.get("STARLING_REQUIRE_PODMAN") == "1":
        pytest.fail(f"STARLING_REQUIRE_PODMAN=1, but {what}")
    pytest.skip(what)


def require_podman() -> None:
    """Skip or fail unless Podman can be started here."""
    if os.geteuid() != 0 or not (shutil.which("podman") and shutil.which("unshare")):
        missing("a Podman service of its own needs root, podman and unshare")
