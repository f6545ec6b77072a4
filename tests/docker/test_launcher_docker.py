"""The launcher against a real Docker engine, with a stand-in for the trainer in an image made here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.engines.base import ReplicaSpec
from launcher.engines.docker.docker import DockerEngine
from launcher.engines.labels import labels
from launcher.errors import EngineError
from launcher.fleet.end import discard, stop
from launcher.status.words import words_for
from tests.conftest import PYTHON_PATH
from tests.contract.conftest import World, base_image, bring_up, docker_engine
from tests.contract.test_engines import SLEEP, ended
from tests.trainer_double import build_double
from tests.waiting import wait_until

pytestmark = pytest.mark.docker

ROOT = Path(__file__).resolve().parents[2]

# What the double is to do is the value of a flag that any training has: the launcher refuses unknown flags.
TRAINER = """
import sys, time
print("args", sys.argv[1:], flush=True)
if "memory://fail" in sys.argv: raise SystemExit(3)
if "memory://arm" in sys.argv:
    import os, shutil
    shutil.copy("/bin/bash", os.environ["STARLING_RUNS"] + "/shell")
    os.chmod(os.environ["STARLING_RUNS"] + "/shell", 0o4755)
    print("armed", os.getuid(), os.getgid(), flush=True)
    time.sleep(3)
    raise SystemExit(0)
if "memory://hog" in sys.argv:
    hog = bytearray()
    while True: hog += b"x" * 10_000_000
for n in range(120): print("epoch", n, flush=True); time.sleep(0.5)
"""


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A Docker world of this test's own owner, emptied afterwards."""
    owner = 10**9 + uuid.uuid4().int % 10**8
    runs = tmp_path / "runs"
    runs.mkdir()
    engine = docker_engine(owner)
    yield World(engine, lambda: docker_engine(owner), runs, f"test/{uuid.uuid4().hex[:8]}")
    for state in engine.list():
        engine.remove(state.id)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    docker_engine(0)  # skips where there is no engine, or no base image
    folder = tmp_path_factory.mktemp("image")
    tag = f"starling-launcher-test:{uuid.uuid4().hex[:8]}"
    build_double(folder, base_image(), tag, TRAINER)
    yield tag
    docker("rmi", "-f", tag)


class Cli:
    """The command line in a folder of its own, on a fleet of its own."""

    def __init__(self, folder: Path, image: str) -> None:
        self.folder = folder
        self.image = image
        self.name = uuid.uuid4().hex[:8]
        self.fleet = f"test/{self.name}"
        self.replica = f"test-{self.name}-cpu0"

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher", *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": PYTHON_PATH},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def up(self, *words: str, training: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        options = ("--image", self.image, "--memory", "128m", "--settle", "0.5", *words)
        return self("up", *options, "--", "--project", "test", "--name", self.name, *training)

    def containers(self) -> list[str]:
        return docker("ps", "-aq", "--filter", f"label=starling.fleet={self.fleet}").split()


@pytest.fixture
def cli(image: str, tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path, image)
    yield cli
    for container in cli.containers():
        docker("rm", "-f", container)


def test_up_status_and_kill_all_by_fleet(cli: Cli) -> None:
    done = cli.up("--cpu", "1")
    assert done.returncode == 0, done.stderr
    assert f"docker attach --sig-proxy=false {cli.replica}" in done.stdout
    again = cli.up("--cpu", "1")
    assert again.returncode == 0
    assert f"already running: {cli.replica}" in again.stdout
    report = json.loads(cli("status", "--json", cli.fleet).stdout)
    assert [row["state"] for row in report["replicas"]] == ["running"]
    assert cli("kill-all", "--yes", cli.fleet).returncode == 0
    assert cli.containers() == []


def euid_of(program: Path) -> str:
    """Return the effective uid that another user of the host gets from a program; nothing where it cannot be run."""
    descriptor = os.open(program.parent.parent, os.O_PATH)  # whatever may be entered on the way there
    place = f"/proc/self/fd/{descriptor}/{program.parent.name}/{program.name}"
    # Only the program that setpriv starts has lost root's capabilities: so that one starts the next.
    words = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "/usr/bin/env", place]
    said = subprocess.run(
        [*words, "-p", "-c", 'echo "$EUID"'],
        pass_fds=[descriptor],
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(descriptor)
    return said.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of root")
@pytest.mark.parametrize("kind", ["missing", "empty", "with results", "opened again"])
def test_a_replica_of_roots_is_never_root_and_its_set_user_id_program_gives_nobody_anything(
    kind: str, cli: Cli
) -> None:
    runs = cli.folder / "runs"
    os.chmod(cli.folder, 0o755)
    if kind != "missing":
        (runs / "test/old").mkdir(parents=True) if kind == "with results" else runs.mkdir(mode=0o755)
    if kind == "opened again":
        os.chown(runs, 10001, 10001)
    done = cli.up("--cpu", "1", training=("--bucket", "memory://arm"))
    assert done.returncode == 0, done.stderr
    [inspected] = json.loads(docker("inspect", cli.replica))
    assert inspected["Config"]["User"] == "10001:10001"
    deadline = time.monotonic() + 10
    while not (runs / "shell").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    during = euid_of(runs / "shell")
    assert during == ("10001" if kind == "opened again" else ""), "the folder is the replica's user's alone"
    assert docker("wait", cli.replica) == "0"
    assert "armed 10001 10001" in docker("logs", cli.replica)
    assert (runs / "shell").stat().st_mode & 0o7000 == 0
    assert euid_of(runs / "shell") == ("12345" if kind == "opened again" else "")
    assert {path.lstat().st_uid for path in (runs, *runs.rglob("*"))} == {10001}
    assert runs.stat().st_mode & 0o777 == (0o755 if kind == "opened again" else 0o700)


def test_root_as_a_replicas_user_is_exit_code_2_and_makes_nothing(cli: Cli) -> None:
    for user in ("0:0", "00:5", "5:0"):
        done = cli.up("--cpu", "1", "--user", user)
        assert done.returncode == 2
        assert "never run as root" in done.stderr
    (cli.folder / "starling.yaml").write_text("user: 0:0\n")
    assert cli.up("--cpu", "1").returncode == 2
    assert cli.containers() == []
    assert not (cli.folder / "runs").exists()


def test_two_ups_at_once_make_one_fleet(cli: Cli) -> None:
    words = [sys.executable, "-m", "launcher", "up", "--image", cli.image, "--memory", "128m", "--cpu", "2"]
    words += ["--settle", "0.5", "--", "--project", "test", "--name", cli.name]
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH}
    both = [
        subprocess.Popen(words, cwd=cli.folder, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [one.communicate(timeout=60)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert sum("already running" in text for text in outputs if "0 started" in text) == 1
    assert len(cli.containers()) == 2


def test_the_hardening_holds_in_a_running_replica(cli: Cli) -> None:
    assert cli.up("--cpu", "1").returncode == 0
    [inspected] = json.loads(docker("inspect", cli.replica))
    host, config = inspected["HostConfig"], inspected["Config"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["ReadonlyRootfs"]
    assert host["Init"]
    assert host["Memory"] == host["MemorySwap"] == 128 * 1024**2
    assert host["PidsLimit"] > 0
    assert config["StopTimeout"] == 60, "`docker stop`, and an engine that goes down, let a trainer save"
    assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}
    assert not config["Tty"]
    assert not config["OpenStdin"]
    assert config["User"] not in ("", "0", "0:0")
    assert not any("docker.sock" in json.dumps(mount) for mount in inspected["Mounts"])
    probe = "touch /usr/src/app/runs/here && touch /tmp/here && ! touch /here 2>/dev/null && ! touch /etc/here 2>/dev/null"
    docker("exec", cli.replica, "sh", "-c", probe)
    assert (cli.folder / "runs/here").exists()


def test_without_a_gpu_runtime_nothing_is_left_in_created(cli: Cli) -> None:
    done = cli.up("--gpus", "0-2")
    if done.returncode in (0, 2):
        pytest.skip("this machine's engine has a GPU runtime")
    assert done.returncode == 5
    assert "nvidia-ctk" in done.stderr
    assert cli.containers() == []


def test_a_missing_image_is_named_with_the_remedy_and_never_pulled(cli: Cli) -> None:
    cli.image = "starling-no-such-image:latest"
    done = cli.up("--cpu", "1")
    assert done.returncode == 5
    assert "docker build -t starling-no-such-image ." in done.stderr
    assert not (cli.folder / "runs").exists()


def test_a_trainer_that_refuses_its_data_gives_its_own_exit_code(cli: Cli) -> None:
    done = cli.up("--cpu", "1", "--settle", "15", training=("--bucket", "memory://fail"))
    assert done.returncode == 3
    assert "data error" in done.stderr
    assert cli.containers() == []


def test_an_out_of_memory_kill_is_told_with_its_limit_and_spares_siblings(world: World) -> None:
    hog = "x = bytearray()\nwhile True: x += b'x' * 5_000_000"
    ids = [world.engine.create(world.spec(code, name)) for code, name in ((hog, "a"), (SLEEP, "b"))]
    for replica_id in ids:
        world.engine.start(replica_id)
    state = ended(world.engine, ids[0])
    assert words_for(state) == "OOM-KILLED at 128 MB"
    sibling = world.engine.state(ids[1])
    assert sibling is not None
    assert sibling.phase == "running"


@pytest.mark.parametrize("label", ["", "starling.owner", "starling.plan"])
def test_a_name_held_by_a_strangers_container_is_named_and_left_alone(world: World, label: str) -> None:
    """Also one that carries some of our labels, or all of them but for a plan of another digest."""
    specs = [world.spec(SLEEP, "a"), world.spec(SLEEP, "b")]
    assert isinstance(world.engine, DockerEngine)
    exact = labels(specs[1], world.engine._owner)
    forged = {
        "": {},
        "starling.owner": {label: exact.get(label, "")},
        "starling.plan": {**exact, label: "{}"},
    }
    stranger = docker("create", "--name", specs[1].name, *_label_words(forged[label]), base_image(), "true")
    try:
        with pytest.raises(
            EngineError, match=f"{specs[1].name}.*held by container {stranger[:12]}"
        ) as caught:
            bring_up(world.engine, specs, settle_s=0)
        assert caught.value.exit_code == 5
        assert world.engine.list() == []
        assert docker("inspect", "-f", "{{.Id}}", specs[1].name) == stranger
    finally:
        docker("rm", "-f", stranger)


def test_kill_all_spares_every_decoy(world: World) -> None:
    spec, lost = world.spec(SLEEP), world.spec(SLEEP, "lost")
    bring_up(world.engine, [spec, lost], settle_s=0)
    assert isinstance(world.engine, DockerEngine)
    exact = labels(spec, world.engine._owner)
    # Whoever renames a replica takes it out of our hands: nothing else tells it from a copy.
    docker("rename", lost.name, f"{lost.name}-renamed")
    decoys = [
        docker("inspect", "-f", "{{.Id}}", f"{lost.name}-renamed"),
        _decoy(f"{spec.name}-more", {}),
        _decoy(f"x{spec.name}", {name: value for name, value in exact.items() if name != "starling.spec"}),
        _decoy(f"copy-of-{spec.name}", exact),
        _decoy(f"{spec.name}-other", {**exact, "starling.fleet": "other/fleet"}),
        _decoy(f"{spec.name}-forged", {**exact, "starling.replica": f"{spec.name}-forged"}),
        _decoy(f"{spec.name}-stranger", labels(world.spec(SLEEP, "stranger"), world.engine._owner + 1)),
    ]
    try:
        assert [state.name for state in world.engine.list()] == [spec.name]
        assert discard(world.engine, world.engine.list()) == []
        assert world.engine.list() == []
        for act in (world.engine.kill, world.engine.terminate):
            act("0" * 64)
        running = docker("inspect", "-f", "{{.State.Running}}", *decoys).split()
        assert running == ["true"] * len(decoys)
    finally:
        docker("rm", "-f", *decoys)


def _label_words(values: dict[str, str]) -> list[str]:
    return [part for key, value in values.items() for part in ("--label", f"{key}={value}")]


def _decoy(name: str, with_labels: dict[str, str]) -> str:
    return docker(
        "run",
        "-d",
        "--network",
        "none",
        "--name",
        name,
        *_label_words(with_labels),
        base_image(),
        "sleep",
        "60",
    )


@pytest.mark.parametrize("how", ["launcher", "docker"])
def test_ctrl_c_in_attach_leaves_the_replica_running(cli: Cli, how: str) -> None:
    assert cli.up("--cpu", "1").returncode == 0
    words = {
        "launcher": [sys.executable, "-m", "launcher", "attach", cli.replica],
        "docker": ["docker", "attach", "--sig-proxy=false", cli.replica],
    }[how]
    watching = subprocess.Popen(
        words,
        cwd=cli.folder,
        env={**os.environ, "PYTHONPATH": PYTHON_PATH, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert watching.stdout is not None
    assert watching.stdout.readline().startswith(("args", "epoch"))
    for _ in range(4):  # some versions of Docker's own client want more than one
        watching.send_signal(signal.SIGINT)
        time.sleep(0.3)
        if watching.poll() is not None:
            break
    watching.kill()
    watching.communicate()
    assert docker("inspect", "-f", "{{.State.Running}}", cli.replica) == "true"


def test_an_id_that_vanished_meanwhile_is_fine(world: World) -> None:
    bring_up(world.engine, [world.spec(SLEEP)], settle_s=0)
    states = world.engine.list()
    docker("rm", "-f", states[0].id)
    assert discard(world.engine, states) == []
    assert stop(world.engine, states, grace_s=1) == []


def test_a_log_flood_reaches_the_reader_in_whole_lines(world: World) -> None:
    spec: ReplicaSpec = world.spec("for n in range(3000): print(n, 'x' * 100)")
    replica_id = world.engine.create(spec)
    world.engine.start(replica_id)
    ended(world.engine, replica_id)
    wait_until(lambda: sum(1 for _ in world.engine.logs(replica_id)) == 3000)
    assert all(line.endswith("x" * 100) for line in world.engine.logs(replica_id))


def test_kill_leaves_a_container_listed_and_clean_removes_it(cli: Cli) -> None:
    assert cli.up("--cpu", "1").returncode == 0
    assert "stays" in cli("clean", "--dry-run", cli.fleet).stdout
    killed = cli("kill", cli.fleet)
    assert (killed.returncode, killed.stdout) == (0, f"{cli.replica}: killed (137)\n")
    assert len(cli.containers()) == 1
    cleaned = cli("clean", "--yes", "--json", cli.replica)
    assert json.loads(cleaned.stdout) == {
        "removed": True,
        "replicas": [cli.replica],
        "runs": [],
        "running": [],
    }
    assert cli.containers() == []
    assert (cli.folder / "runs").exists()


def _give_to_replicas(runs: Path) -> None:
    """Make the folder as `up` leaves it when root calls."""
    runs.mkdir()
    if os.getuid() == 0:
        os.chown(runs, 10001, 10001)


def test_doctor_finds_this_engine_well_and_leaves_nothing(cli: Cli) -> None:
    _give_to_replicas(cli.folder / "runs")
    done = cli("doctor", "--json", "--image", cli.image)
    checks = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, done.stdout
    assert checks["engine"]["text"].startswith("Docker ")
    assert checks["container"]["text"] == "starts with its limits of memory and /dev/shm"
    assert "can write there" in checks["runs inside"]["text"]
    assert docker("ps", "-aq", "--filter", "name=starling-doctor-") == ""
    assert list((cli.folder / "runs").iterdir()) == []


def test_doctor_names_an_image_without_our_trainer_and_a_gpu_that_no_runtime_gives(cli: Cli) -> None:
    (cli.folder / "runs").mkdir()
    foreign = cli("doctor", "--image", base_image())
    assert foreign.returncode == 5
    assert f"{base_image()} holds no /usr/src/app/train.py" in foreign.stdout
    gone = cli("doctor", "--image", "starling-no-such-image:latest")
    assert gone.returncode == 5
    assert "docker build -t starling-no-such-image" in gone.stdout
    gpu = cli("doctor", "--image", cli.image, "--gpu", "0")
    if gpu.returncode == 0:
        pytest.skip("this machine's engine has a GPU runtime")
    assert "nvidia-ctk" in gpu.stdout
    assert docker("ps", "-aq", "--filter", "name=starling-doctor-") == ""
