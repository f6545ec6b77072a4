"""The launcher compared with Docker's own client in one run: start-up, `up`, `status`, `kill-all`, and watching.

    python bench/launcher.py                    # as root, with dockerd, its client, and an image with Python 3
    python bench/launcher.py --rounds 15 --base python:3.11-slim

The engine is private, in its own network namespace, with an image built here: `docker kill $(docker ps -q)` ends no
other containers. The GPUs are simulated (an NVIDIA hook that does nothing), so that five replicas fit on any machine.
The figures are those of the launcher and the engine; a real GPU's driver would add the same to both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "app"))

from tests.trainer_double import write_double  # noqa: E402

IMAGE = "starling-bench"
TRAINER = """
import os, sys, time
if "--name=busy" not in sys.argv:
    time.sleep(600)
place = os.path.join(os.environ["STARLING_RUNS"], os.environ["STARLING_REPLICA"] + ".count")
count = 0
while True:
    end = time.monotonic() + 0.1
    while time.monotonic() < end:
        for _ in range(1000): count += 1
    with open(place + ".part", "w") as file: file.write(str(count))
    os.replace(place + ".part", place)
"""
DOCKERFILE = """
FROM {base}
RUN mkdir -p /usr/src/app/runs && if ! command -v python; then ln -s python3 /usr/bin/python; fi
COPY app /usr/src/app
LABEL starling.trainer=1 starling.cuda=13.0
"""
LAUNCHER = [str(Path(sys.executable).with_name("launcher"))]
"""The command that pip installs."""
SETTLE_S = 1.0
"""Seconds for processes to start before they are ended, so that both sides end running trainers."""
UP = [*LAUNCHER, "up", "--memory", "64m", "--image", IMAGE]
TRAINING = ["--", "--data", "blood/blood.yaml", "--weights", "", "--project", "bench", "--evolve", "60"]


@contextlib.contextmanager
def private_engine(folder: Path, base: str) -> Iterator[dict[str, str]]:
    """Start a dockerd with the simulated hook and the image, and yield the environment variables for its clients."""
    hook = folder / "bin" / "nvidia-container-runtime-hook"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\nexit 0\n")
    hook.chmod(0o755)
    path = f"{hook.parent}:{os.environ['PATH']}"
    address = f"unix://{folder}/docker.sock"
    command = ["unshare", "--net", "dockerd", "-H", address, "--data-root", f"{folder}/data", "--exec-root",
               f"{folder}/exec", "--pidfile", f"{folder}/pid", "--iptables=false"]  # fmt: skip
    with open(folder / "log", "w") as log:
        engine = subprocess.Popen(
            command, env={**os.environ, "PATH": path}, stdout=log, stderr=subprocess.STDOUT
        )
    here = {
        **os.environ,
        "PATH": path,
        "DOCKER_HOST": address,
        "DOCKER_BUILDKIT": "0",
        "PYTHONPATH": f"{REPOSITORY / 'app'}:{REPOSITORY}",
    }
    here.pop("PYTHONDONTWRITEBYTECODE", None)  # as for users: pip compiles what it installs
    try:
        for _ in range(60):
            if subprocess.run(["docker", "info"], env=here, capture_output=True).returncode == 0:
                break
            time.sleep(0.5)
        else:
            sys.exit(f"the private engine does not start: {(folder / 'log').read_text()[-800:]}")
        with subprocess.Popen(["docker", "save", base], stdout=subprocess.PIPE) as saved:
            subprocess.run(
                ["docker", "load", "-q"], env=here, stdin=saved.stdout, check=True, capture_output=True
            )
        write_double(folder / "image" / "app", TRAINER)
        (folder / "image" / "Dockerfile").write_text(DOCKERFILE.format(base=base))
        subprocess.run(["docker", "build", "-q", "-t", IMAGE, "image"], cwd=folder, env=here, check=True,
                       capture_output=True)  # fmt: skip
        yield here
    finally:
        everything = subprocess.run(
            ["docker", "ps", "-aq"], env=here, capture_output=True, text=True
        ).stdout.split()
        if everything:
            subprocess.run(["docker", "rm", "-f", *everything], env=here, capture_output=True)
        engine.terminate()
        engine.wait(60)


class Bench:
    """Run commands in a separate folder on the private engine, and measure their wall-clock time."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.engine = int((folder / "pid").read_text())
        (folder / "blood").mkdir()
        (folder / "blood" / "blood.yaml").write_text("train: .\nval: .\nnames: [RBC]\n")
        (folder / "runs").mkdir()
        self.seconds: dict[str, list[float]] = {}

    def run(self, *command: str) -> str:
        """Run a command that must succeed, and return its output."""
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{shlex.join(command)}: {done.stderr}")
        return done.stdout

    def time(self, what: str, *command: str) -> None:
        """Run a command and record its duration."""
        start = time.perf_counter()
        self.run(*command)
        self.seconds.setdefault(what, []).append(time.perf_counter() - start)

    def median(self, what: str) -> float:
        return statistics.median(self.seconds[what])

    def loop(self, replicas: int) -> str:
        """Return the usual shell loop: one `docker run -d` after the other."""
        mounts = f"-v {self.folder}/blood:{self.folder}/blood -v {self.folder}/runs:/usr/src/app/runs"
        training = f"--data {self.folder}/blood/blood.yaml --project bench --evolve 60"
        return (
            f"for i in $(seq 0 {replicas - 1}); do docker run -d --ipc=host --gpus all {mounts} {IMAGE} "
            f"python /usr/src/app/train.py {training} --device $i; done"
        )

    def compare(self, replicas: int) -> None:
        """Start and end `replicas` replicas in both ways."""
        last = replicas - 1
        self.time(f"loop {replicas}", "bash", "-c", self.loop(replicas))
        time.sleep(SETTLE_S)
        self.time(f"docker kill {replicas}", "bash", "-c", "docker kill $(docker ps -q)")
        self.run("bash", "-c", "docker rm $(docker ps -aq)")
        self.time(f"up {replicas}", *UP, "--gpus", f"0-{last}", *TRAINING)
        time.sleep(SETTLE_S)
        self.time(f"status {replicas}", *LAUNCHER, "status")
        self.time(f"kill-all {replicas}", *LAUNCHER, "kill-all", "--yes")

    def watching(self, windows: int, seconds: float) -> tuple[list[float], float, float]:
        """Watch eight busy replicas, which leave no core idle, and then do not watch them, in turns.

        Return the ratios of their watched to unwatched rates, and the shares of a core that watcher and engine take.
        """
        self.run(*UP, "--gpus", "0-7", *TRAINING, "--name=busy")
        time.sleep(2)
        ratios, watcher_s, engine_s = [], 0.0, 0.0
        for number in range(windows):
            rates: dict[bool, float] = {}
            for watched in (False, True) if number % 2 == 0 else (True, False):  # a drift cancels out
                if not watched:
                    rates[watched] = self._rate(seconds)
                    continue
                with self._watcher() as watcher:
                    before = cpu_seconds(watcher.pid), cpu_seconds(self.engine)
                    rates[watched] = self._rate(seconds)
                    watcher_s += cpu_seconds(watcher.pid) - before[0]
                    engine_s += cpu_seconds(self.engine) - before[1]
            ratios.append(rates[True] / rates[False])
        self.run(*LAUNCHER, "kill-all", "--yes")
        return ratios, watcher_s / (windows * seconds), engine_s / (windows * seconds)

    @contextlib.contextmanager
    def _watcher(self) -> Iterator[subprocess.Popen[bytes]]:
        watcher = subprocess.Popen(
            [*LAUNCHER, "status", "--watch"], cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL
        )
        time.sleep(1.5)  # the start-up belongs to the figure of `status`
        try:
            yield watcher
        finally:
            watcher.send_signal(signal.SIGINT)
            watcher.wait(10)

    def _rate(self, seconds: float) -> float:
        start, before = time.perf_counter(), self._count()
        time.sleep(seconds)
        return (self._count() - before) / (time.perf_counter() - start)

    def _count(self) -> int:
        return sum(int(path.read_text()) for path in (self.folder / "runs").glob("*.count"))


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine(environment: dict[str, str]) -> str:
    """Return processor and engine in a line."""
    with open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "?")
    version = subprocess.run(["docker", "version", "-f", "client {{.Client.Version}}, engine {{.Server.Version}}"],
                             env=environment, capture_output=True, text=True).stdout.strip()  # fmt: skip
    return f"{os.cpu_count()} cores of {name}; {version}; load {os.getloadavg()[0]:.1f} at the start"


def main() -> None:
    """Measure, and print each figure beside its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--base", default=os.environ.get("BASE", "base:bookworm"), help="an image with Python 3"
    )
    parser.add_argument("--windows", type=int, default=6, help="pairs of watched and unwatched windows")
    parser.add_argument("--window", type=float, default=6.0, metavar="SECONDS")
    options = parser.parse_args()
    # A socket's path is at most 107 characters long.
    folder = Path(tempfile.mkdtemp(prefix="starling-", dir="/tmp"))
    try:
        with private_engine(folder, options.base) as environment:
            print(machine(environment), flush=True)
            bench = Bench(folder, environment)
            for _ in range(options.rounds):
                bench.time("--help", *LAUNCHER, "--help")
                bench.compare(5)
                bench.compare(8)
            report(bench)
            ratios, watcher, dockerd = bench.watching(options.windows, options.window)
            print(
                f"8 busy replicas, watched to unwatched   {statistics.median(ratios):6.3f}  "
                f"({min(ratios):.3f} to {max(ratios):.3f})   1: no measurable load"
            )
            print(f"of one core, watching takes             {watcher:6.1%}  and dockerd {dockerd:.1%}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(bench: Bench) -> None:
    """Print medians in seconds, and the ratios to the limits."""
    print(
        f"launcher --help                         {bench.median('--help'):6.3f} s               at most 0.150"
    )
    print(
        f"launcher status, 8 replicas             {bench.median('status 8'):6.3f} s               at most 0.300"
    )
    for replicas in (5, 8):
        up, loop = bench.median(f"up {replicas}"), bench.median(f"loop {replicas}")
        print(f"launcher up, {replicas} replicas                 {up:6.3f} s")
        print(f"docker run -d, {replicas} in a loop              {loop:6.3f} s")
        print(f"up to the loop                          {up / loop:6.2f}                 at most 1.00")
        end, kill = bench.median(f"kill-all {replicas}"), bench.median(f"docker kill {replicas}")
        print(f"launcher kill-all, {replicas} replicas           {end:6.3f} s")
        print(f"docker kill $(docker ps -q), {replicas}          {kill:6.3f} s")
        print(
            f"kill-all to docker kill                 {end / kill:6.2f}                 at most 1.40",
            flush=True,
        )


if __name__ == "__main__":
    main()
