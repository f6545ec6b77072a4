"""A Docker engine of a test's own, which it may kill: in a network namespace of its own, so that no other is touched."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.docker.conftest import missing


class PrivateEngine:
    """A `dockerd` below a folder of its own. Its containers have no network."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder, self._options = folder, options
        self.address = f"unix://{folder}/docker.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        """Start it and wait until it answers; `more` are further options of dockerd."""
        folder = self._folder
        # Where no init buries orphans, the killed containerd seems to be alive by its number.
        for left in (folder / "pid", folder / "docker.sock", folder / "exec/containerd/containerd.pid"):
            left.unlink(missing_ok=True)
        command = ["unshare", "--net", "dockerd", "-H", self.address, "--data-root", f"{folder}/data", "--exec-root",
                   f"{folder}/exec", "--pidfile", f"{folder}/pid", "--bridge=none", "--iptables=false",
                   *self._options, *more]  # fmt: skip
        with open(folder / "log", "a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        for _ in range(240):
            if self.docker("info").returncode == 0:
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.25)
        missing(f"the private engine does not start: {(folder / 'log').read_text()[-500:]}")

    def kill(self) -> None:
        """Kill `dockerd` as `kill -9` does; what it started lives on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def lose_power(self) -> None:
        """Kill the engine and everything that it started, at once."""
        self.kill()
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes(self) -> list[int]:
        """Return this engine's containerd, its shims, and the containers' processes: each has the folder's name on it."""
        marks = [str(self._folder).encode()]
        ids = [path.name.encode() for path in (self._folder / "data" / "containers").glob("*")]
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes() + (entry / "cgroup").read_bytes()
                if any(mark in line for mark in marks + ids) and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
        return found

    def docker(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the docker client against it."""
        return subprocess.run(
            ["docker", *words], env={**os.environ, "DOCKER_HOST": self.address}, capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip

    def load(self, image: str) -> None:
        """Copy an image over from the machine's engine."""
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
            subprocess.run(
                ["docker", "-H", self.address, "load", "-q"],
                stdin=saved.stdout,
                check=True,
                capture_output=True,
            )


@contextlib.contextmanager
def private_engine(*options: str) -> Iterator[PrivateEngine]:
    """Start one, and leave nothing of it."""
    if os.geteuid() != 0 or not (shutil.which("dockerd") and shutil.which("unshare")):
        missing("a private engine needs root, dockerd and unshare")
    # A socket's path is at most 107 characters long, so not below pytest's own folders.
    folder = Path(tempfile.mkdtemp(prefix="starling-", dir="/tmp"))
    engine = PrivateEngine(folder, *options)
    try:
        engine.start()
        yield engine
    finally:
        engine.lose_power()
        for mount in sorted(_mounts(folder), reverse=True):
            subprocess.run(["umount", "-l", mount], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def _mounts(folder: Path) -> list[str]:
    lines = Path("/proc/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(f"{folder}/")]
