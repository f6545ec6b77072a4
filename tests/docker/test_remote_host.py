# ruff: noqa: F811 (fixtures that are imported are named again by the tests that take them)
"""One remote engine over ssh: a real sshd, and a launcher and a remote machine that see different files.

The remote machine is this machine behind an sshd of the test's own on 127.0.0.1. Mount namespaces part the two sides: an
empty file system hides the remote folder from the launcher and the launcher's folder from the remote side, while the
engine, as a real one there would, sees what the remote side sees.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.errors import EngineError
from launcher.hosts.lock import host_lock
from tests.conftest import PYTHON_PATH
from tests.docker.conftest import docker, missing
from tests.docker.test_launcher_docker import image  # noqa: F401  (a stand-in for the trainer, as a fixture)

pytestmark = pytest.mark.docker

UNSHARE, MOUNT = (shutil.which(name) or name for name in ("unshare", "mount"))


@dataclass(frozen=True)
class RemoteMachine:
    """Both sides of the connection."""

    port: int
    folder: Path
    """What only the machine and its engine see; the home folder there is `home` in it."""
    laptop: Path
    """What only the launcher sees."""
    programs: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def tools(self) -> Path:
        """The first folder of the PATH there."""
        return self.folder / "tools"

    def calls(self) -> list[str]:
        """Return the words of every call of ssh so far."""
        return (self.programs.parent / "calls").read_text().splitlines()

    def connections(self) -> int:
        """Return how many times the launcher has logged in so far."""
        return sum("-M" in call.split() for call in self.calls())

    def environment(self) -> dict[str, str]:
        """Return variables under which a program here reaches the machine."""
        return {
            **os.environ,
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "PYTHONPATH": PYTHON_PATH,
            "DOCKER_HOST": f"ssh://root@127.0.0.1:{self.port}",
        }

    def launcher(
        self, *words: str, host: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the launcher where the machine's folder is not to be seen."""
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("STARLING_", "DOCKER_"))
        }
        hidden = f'{MOUNT} -t tmpfs none {self.folder} && cd {self.laptop} && exec "$@"'
        url = f"ssh://root@127.0.0.1:{self.port}" if host is None else host
        host_words = ["--host", url] if url else []
        return subprocess.run(
            [
                UNSHARE,
                "--mount",
                "/bin/sh",
                "-c",
                hidden,
                "sh",
                sys.executable,
                "-m",
                "launcher",
                words[0],
                *host_words,
                *words[1:],
            ],
            env={
                **clean,
                "PATH": f"{self.programs}:{os.environ['PATH']}",
                "PYTHONPATH": PYTHON_PATH,
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, engine: None) -> Iterator[RemoteMachine]:
    """A machine behind an sshd as Debian sets it up."""
    yield from start_machine(tmp_path_factory.mktemp("ssh"))


@pytest.fixture(scope="module")
def strict_machine(tmp_path_factory: pytest.TempPathFactory, engine: None) -> Iterator[RemoteMachine]:
    """A machine behind an sshd that forwards no sockets."""
    yield from start_machine(
        tmp_path_factory.mktemp("ssh"), "AllowStreamLocalForwarding no\nAllowTcpForwarding no\n"
    )


def start_machine(folder: Path, settings: str = "") -> Iterator[RemoteMachine]:
    """Start an sshd with keys of its own, that knows one user by key and nobody by password."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if os.geteuid() != 0 or sshd is None or not (shutil.which("ssh") and shutil.which("unshare")):
        missing("a machine behind ssh needs root, openssh-server, openssh-client and unshare")
    assert sshd is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = RemoteMachine(port, folder / "machine", folder / "laptop", folder / "bin")
    for place in (made.home, made.tools, made.laptop, made.programs, Path("/run/sshd")):
        place.mkdir(parents=True, exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"{settings}AuthorizedKeysFile {folder}/user.pub\nPasswordAuthentication no\nSetEnv HOME={made.home} PATH={made.tools}:/usr/bin:/bin\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\nIdentityFile {folder}/user\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known\n"
        "GlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\nBatchMode yes\n"
        # What people have there for sessions of their own, and what must not get in the way.
        "RemoteCommand exec bash\nRequestTTY yes\nLocalForward 1 192.0.2.1:1\nExitOnForwardFailure yes\n"
    )
    # The system's own client, with settings that a user would have in ~/.ssh/config.
    client = made.programs / "ssh"
    client.write_text(
        f'#!/bin/sh\necho "$@" >>{folder}/calls\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n'
    )
    client.chmod(0o755)
    hidden = f"mount -t tmpfs none {made.laptop} && exec {sshd} -D -e -f {folder}/sshd_config"
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(["unshare", "--mount", "sh", "-c", hidden], stderr=log)
    try:
        _wait(port, server, folder / "log")
        yield made
    finally:
        server.terminate()
        server.wait(10)


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            break
        time.sleep(0.05)
    missing(f"sshd does not start: {log.read_text()[-500:]}")


@pytest.fixture
def fleet() -> Iterator[str]:
    """Return the name of a fleet whose containers are removed afterwards."""
    name = uuid.uuid4().hex[:8]
    yield name
    for container in docker("ps", "-aq", "--filter", f"label=starling.fleet=test/{name}").stdout.split():
        docker("rm", "-f", container)


def test_up_status_logs_and_kill_all_on_a_machine_behind_ssh(
    machine: RemoteMachine, image: str, fleet: str
) -> None:
    data = machine.home / "data"
    (data / "images").mkdir(parents=True, exist_ok=True)
    (data / "set.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [a]\n")
    words = ("up", "--cpu", "1", "--image", image, "--memory", "128m", "--settle", "0.5")
    training = ("--", "--data", "data/set.yaml", "--project", "test", "--name", fleet)
    done = machine.launcher(*words, *training)
    assert done.returncode == 0, done.stderr
    assert f"launcher attach --host ssh://root@127.0.0.1:{machine.port} test-{fleet}-cpu0" in done.stdout
    assert machine.connections() == 1, "everything goes over one connection"
    assert machine.launcher(*words, *training).stdout.count(f"already running: test-{fleet}-cpu0") == 1
    runs = machine.home / "runs"
    assert runs.is_dir(), "relative paths start at the home folder there, as with scp"
    assert not list(machine.laptop.iterdir())
    [inspected] = json.loads(docker("inspect", f"test-{fleet}-cpu0").stdout)
    assert {mount["Source"]: mount["RW"] for mount in inspected["Mounts"]} == {
        str(runs): True,
        str(data): False,
    }
    assert f"{data}/set.yaml" in inspected["Args"]

    (runs / ".workers").mkdir(exist_ok=True)
    (runs / f".workers/test-{fleet}-cpu0.json").write_text(
        json.dumps({"epoch": 3, "epochs": 10, "best_fitness": 0.25, "updated": time.time() + 60})
    )
    [row] = json.loads(machine.launcher("status", "--json", f"test/{fleet}").stdout)["replicas"]
    assert (row["state"], row["epoch"], row["best_fitness"]) == ("running", 3, 0.25)
    assert row["memory_used_bytes"] > 0
    assert row["cpu_percent"] is not None
    assert machine.launcher("logs", f"test/{fleet}").stdout.startswith("args ")
    assert machine.launcher("kill-all", "--yes", f"test/{fleet}").returncode == 0
    assert docker("ps", "-aq", "--filter", f"label=starling.fleet=test/{fleet}").stdout == ""


@pytest.mark.parametrize(
    ("training", "code", "says"),
    [
        (("--data", "gone.yaml"), 3, "no such file on the remote machine"),
        (("--data", "{laptop}/mine.yaml"), 3, "no such file on the remote machine"),
        (("--data", "rootless.yaml"), 3, "rootless.yaml: its root"),
        (("--data", "etc.yaml"), 3, "would show replicas more than a dataset"),
        (("--data", "link.yaml"), 3, "would show replicas more than a dataset"),
        (("--data", "bomb.yaml"), 3, "bomb.yaml: larger than 256 KiB"),
        (("--weights", "gone.pt"), 4, "no such file on the remote machine"),
        (("--weights", "yolov5s.pt"), 4, "/home/.cache/starling/weights"),
        (("--resume", "runs/gone.pt"), 4, "no such checkpoint"),
    ],
)
def test_paths_are_those_of_the_machine_and_checked_there(
    machine: RemoteMachine, training: tuple[str, str], code: int, says: str
) -> None:
    (machine.laptop / "mine.yaml").write_text("path: .\ntrain: .\nval: .\nnames: [a]\n")
    for name, root in (("rootless", "gone"), ("etc", "/etc/ssh"), ("link", "to-etc")):
        (machine.home / f"{name}.yaml").write_text(f"path: {root}\ntrain: .\nval: .\nnames: [a]\n")
    (machine.home / "bomb.yaml").write_text("#" * 1_200_000)
    if not (machine.home / "to-etc").is_symlink():
        (machine.home / "to-etc").symlink_to("/etc")
    words = [word.format(laptop=machine.laptop) for word in training]
    done = machine.launcher("up", "--cpu", "1", "--runs", "not-made", "--", *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert not (machine.home / "not-made").exists()


@pytest.mark.parametrize("runs", ["/", "~", "a-file/runs"])
def test_a_runs_folder_that_cannot_be_one_there_is_refused(
    machine: RemoteMachine, image: str, runs: str
) -> None:
    (machine.home / "a-file").touch()
    done = machine.launcher("up", "--cpu", "1", "--runs", runs, "--image", image, "--", "--data", "bccd.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --runs ")


def test_an_up_waits_for_another_one_on_that_machine(machine: RemoteMachine, image: str, fleet: str) -> None:
    runs = machine.home / "held"
    runs.mkdir()
    words = ("up", "--runs", "held", "--cpu", "1", "--image", image, "--memory", "128m", "--settle", "0.2")
    descriptor = os.open(runs, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    threading.Timer(8, os.close, (descriptor,)).start()  # a loaded machine takes seconds to get there
    start = time.monotonic()
    done = machine.launcher(*words, "--", "--project", "test", "--name", fleet)
    assert done.returncode == 0, done.stderr
    assert "waiting for another `launcher up`" in done.stdout
    assert time.monotonic() - start > 7.9
    again = os.open(runs, os.O_RDONLY)
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the connection
    os.close(again)


HOLD = """
import os
from launcher.hosts.ssh_connection import SshConnection
from launcher.hosts.ssh_runs import remote_host_lock
with remote_host_lock(SshConnection(os.environ["DOCKER_HOST"])) as release:
    print("held", flush=True)
    if input() == "release": release()
    print("said", flush=True)
    input()
"""


@pytest.mark.parametrize("ends", ["release", "end", "kill"])
def test_an_up_from_elsewhere_holds_the_machine_against_those_on_it(
    machine: RemoteMachine, ends: str, said: list[str]
) -> None:
    elsewhere = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=machine.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert elsewhere.stdin is not None
    assert elsewhere.stdout is not None
    assert elsewhere.stdout.readline() == "held\n"
    with pytest.raises(EngineError), host_lock(wait_s=0.3):
        raise AssertionError("not reached")
    assert said
    if ends == "release":
        elsewhere.stdin.write("release\n")
        elsewhere.stdin.flush()
        assert elsewhere.stdout.readline() == "said\n"
    elif ends == "kill":
        elsewhere.kill()
    else:
        elsewhere.stdin.close()
    with host_lock(wait_s=10):
        pass
    elsewhere.kill()
    elsewhere.wait()
    elsewhere.stdout.close()


def test_gpus_there_are_those_that_its_nvidia_smi_lists(machine: RemoteMachine, image: str) -> None:
    smi = machine.tools / "nvidia-smi"  # a double: it says what a driver's own would
    smi.write_text(
        "#!/bin/sh\necho '0, GPU-aaaaaaaa, NVIDIA H100 80GB HBM3, 81559'\necho '1, GPU-bbbbbbbb, NVIDIA H100, 81559'\n"
    )
    smi.chmod(0o755)
    try:
        plan = machine.launcher(
            "up", "--gpus", "all", "--image", image, "--dry-run", "--json", "--", "--data", "bccd.yaml"
        )
        shown = json.loads(plan.stdout)
        assert len(shown["replicas"]) == 2
        assert all("GPU runtime" in problem["message"] for problem in shown["problems"])
        assert plan.returncode == (5 if shown["problems"] else 0)
        refused = machine.launcher(
            "up", "--gpus", "7", "--image", image, "--dry-run", "--", "--data", "bccd.yaml"
        )
        assert refused.returncode in (2, 5), "5 where the want of a GPU runtime is told as well"
        assert "NVIDIA H100" in refused.stderr
    finally:
        smi.unlink()


def test_docker_host_and_a_docker_context_reach_the_same_machine(machine: RemoteMachine) -> None:
    url = f"ssh://root@127.0.0.1:{machine.port}"
    folder = machine.programs.parent / "docker-config"
    docker("--config", str(folder), "context", "create", "machine", "--docker", f"host={url}")
    for environment in ({"DOCKER_HOST": url}, {"DOCKER_CONFIG": str(folder), "DOCKER_CONTEXT": "machine"}):
        before = machine.connections()
        done = machine.launcher("status", "test/none", host="", **environment)
        assert (done.returncode, machine.connections()) == (2, before + 1), done.stderr
        assert "no such replica or fleet" in done.stderr


def test_a_machine_that_cannot_be_reached_is_told_in_sshs_own_words(machine: RemoteMachine) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        for host, why in (
            (f"ssh://root@127.0.0.1:{port}", "Connection refused"),
            (f"ssh://root@localhost:{machine.port}", "Host key verification failed"),
            (f"ssh://nobody@127.0.0.1:{machine.port}", "Permission denied"),
        ):
            start = time.monotonic()
            done = machine.launcher("status", host=host)
            assert (done.returncode, done.stdout) == (5, "")
            assert why in done.stderr
            assert "this must work first: ssh " in done.stderr
            assert time.monotonic() - start < 10
    assert "openssh-client" in machine.launcher("status", PATH="/nowhere").stderr


def test_doctor_looks_at_that_machine(machine: RemoteMachine, image: str) -> None:
    (machine.home / "seen").mkdir()
    os.chown(machine.home / "seen", 10001, 10001)
    done = machine.launcher("doctor", "--runs", "seen", "--image", image, "--json")
    checks = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, done.stdout
    assert "socket" not in checks
    assert checks["runs folder"]["text"] == f"{machine.home}/seen on 127.0.0.1: may be written"
    assert "free" in checks["runs' disk"]["text"]
    assert "can write there" in checks["runs inside"]["text"]


def test_the_files_host_is_every_commands(machine: RemoteMachine) -> None:
    (machine.laptop / "starling.yaml").write_text(f"host: ssh://root@127.0.0.1:{machine.port}\nruns: there\n")
    before = machine.connections()
    done = machine.launcher("status", "test/none", host="")
    plan = machine.launcher("up", "--cpu", "1", "--dry-run", "--json", "--", "--data", "bccd.yaml", host="")
    (machine.laptop / "starling.yaml").unlink()
    assert (done.returncode, machine.connections()) == (2, before + 2), done.stderr
    assert json.loads(plan.stdout)["replicas"][0]["runs"] == f"{machine.home}/there"


def test_what_cannot_work_on_another_machine_is_refused(machine: RemoteMachine) -> None:
    local = machine.launcher("status", "--engine", "local")
    assert (local.returncode, local.stderr.startswith("error: --host")) == (2, True)
    clean = machine.launcher("clean", "--runs-too", "--yes")
    assert clean.returncode == 2
    assert "run `launcher clean --runs-too` on 127.0.0.1" in clean.stderr


MANY = """
import os, socket
from launcher.hosts.ssh_connection import SshConnection
connection = SshConnection(os.environ["DOCKER_HOST"])
path = str(connection.docker_socket)
ends = [socket.socket(socket.AF_UNIX) for _ in range(14)]
for end in ends:
    end.connect(path)
    end.sendall(b"GET /_ping HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
print([end.recv(15) for end in ends] == [b"HTTP/1.1 200 OK"] * 14)
"""


@pytest.mark.parametrize("sshd", ["machine", "strict_machine"])
def test_more_streams_than_sshd_has_sessions_for_all_reach_the_engine(
    sshd: str, request: pytest.FixtureRequest
) -> None:
    """sshd gives a connection ten sessions; `logs -f` of a dozen replicas wants more, forwarded sockets or not."""
    machine: RemoteMachine = request.getfixturevalue(sshd)
    done = subprocess.run(
        [sys.executable, "-c", MANY], env=machine.environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "True\n", done.stderr
    dialled = [call for call in machine.calls() if call.endswith("docker system dial-stdio")]
    assert len(dialled) == (0 if sshd == "machine" else 14)


def test_an_sshd_that_forwards_no_socket_will_do(strict_machine: RemoteMachine) -> None:
    done = strict_machine.launcher("status", "test/none")
    assert (done.returncode, "no such replica or fleet" in done.stderr) == (2, True)


def test_a_socket_that_is_not_the_users_there_is_named_with_its_group(tmp_path: Path, engine: None) -> None:
    """The login becomes a user without rights, who meets the machine's own socket."""
    less = "ForceCommand exec setpriv --reuid=65534 --regid=65534 --clear-groups sh\n"
    for machine in start_machine(tmp_path, less):
        done = machine.launcher("status")
        assert (done.returncode, done.stdout) == (5, "")
        assert "/var/run/docker.sock there is not yours to use; it is for group " in done.stderr
        assert "usermod -aG" in done.stderr


def test_a_killed_launcher_leaves_no_connection_behind(machine: RemoteMachine) -> None:
    before = set(_ssh_processes(machine))
    code = (
        "import os, time; from launcher.hosts.ssh_connection import SshConnection; "
        "connection = SshConnection(os.environ['DOCKER_HOST']); print(connection.home, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        env=machine.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == f"{machine.home}\n"
    assert set(_ssh_processes(machine)) - before
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 10
    while set(_ssh_processes(machine)) - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(_ssh_processes(machine)) <= before
    holder.stdout.close()


def test_a_lost_connection_ends_the_command_with_one_message_and_the_replica_lives_on(
    machine: RemoteMachine,
    image: str,
    fleet: str,
) -> None:
    options = ("--cpu", "1", "--image", image, "--memory", "128m", "--settle", "0")
    up = machine.launcher("up", *options, "--", "--project", "test", "--name", fleet)
    assert up.returncode == 0, up.stderr
    before = set(_ssh_processes(machine))
    watching = subprocess.Popen(
        [sys.executable, "-m", "launcher", "logs", "--follow", f"test/{fleet}"],
        cwd=machine.laptop,
        env=machine.environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    assert watching.stdout.readline().startswith("args ")
    for process in set(_ssh_processes(machine)) - before:
        os.kill(process, signal.SIGKILL)
    _, said = watching.communicate(timeout=20)
    assert watching.returncode == 5
    assert said.startswith("error: 127.0.0.1 cannot be reached by ssh (the connection ended)")
    assert said.count("\n") == 1
    assert docker("inspect", "-f", "{{.State.Running}}", f"test-{fleet}-cpu0").stdout == "true\n"


def test_an_engine_behind_tcp_shares_our_paths_and_tells_progress_itself(
    tmp_path: Path,
    image: str,
    fleet: str,
) -> None:
    with _relayed("/var/run/docker.sock") as port:

        def launcher(*words: str) -> subprocess.CompletedProcess[str]:
            words = (words[0], "--host", f"tcp://127.0.0.1:{port}", *words[1:])
            return subprocess.run(
                [sys.executable, "-m", "launcher", *words],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": PYTHON_PATH, "STARLING_RUNS": "runs"},
                capture_output=True,
                text=True,
                timeout=60,
            )

        options = ("--cpu", "1", "--image", image, "--memory", "128m", "--settle", "0")
        up = launcher("up", *options, "--", "--project", "test", "--name", fleet)
        assert up.returncode == 0, up.stderr
        told = tmp_path / f"runs/.workers/test-{fleet}-cpu0.json"
        told.parent.mkdir(exist_ok=True)
        told.write_text(json.dumps({"epoch": 3, "updated": time.time() + 60}))
        docker("kill", f"test-{fleet}-cpu0")
        [row] = json.loads(launcher("status", "--json", f"test/{fleet}").stdout)["replicas"]
        assert (row["epoch"], row["exit_code"]) == (3, 137), "of a replica that has ended as well"


LOOK = """
import sys, time
from launcher.engines.opening import find_host, open_docker
from launcher.status.watch import WatchView
view = WatchView(open_docker(find_host("docker")), sys.argv[1:])
view.rows()
for _ in range(3):
    begun = time.perf_counter()
    rows = view.rows()
    print(time.perf_counter() - begun, len(rows), all(row.figures.cpu_percent is not None for row in rows))
"""


def test_watching_replicas_on_another_machine_takes_a_fraction_of_a_second(
    machine: RemoteMachine, image: str, fleet: str
) -> None:
    options = (
        "--cpu",
        str(min(os.cpu_count() or 1, 4)),
        "--image",
        image,
        "--memory",
        "64m",
        "--settle",
        "0",
    )
    up = machine.launcher("up", *options, "--", "--project", "test", "--name", fleet, "--evolve", "2")
    assert up.returncode == 0, up.stderr
    done = subprocess.run(
        [sys.executable, "-c", LOOK, f"test/{fleet}"],
        cwd=machine.laptop,
        env=machine.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    looks = [line.split() for line in done.stdout.splitlines()]
    assert len(looks) == 3, done.stderr
    assert {tuple(look[1:]) for look in looks} == {(options[1], "True")}
    assert min(float(look[0]) for look in looks) < 0.3, "an engine alone takes a second to tell what is used"


@contextlib.contextmanager
def _relayed(path: str) -> Iterator[int]:
    """Offer a Unix socket on a port of 127.0.0.1 for a while."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = listener.accept()
                there = socket.socket(socket.AF_UNIX)
                there.connect(path)
                for ends in ((here, there), (there, here)):
                    threading.Thread(target=copy, args=ends, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def _ssh_processes(machine: RemoteMachine) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(machine.programs.parent / "ssh_config").encode() in words:
            found.append(int(place.name))
    return found
