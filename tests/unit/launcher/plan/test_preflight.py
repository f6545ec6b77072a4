"""What `up` checks before it starts anything: each refusal with its remedy, all of them at once, and what is let pass."""

from __future__ import annotations

import grp
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.devices.inventory import Driver, Machine
from launcher.engines.base import Image, ReplicaState
from launcher.errors import EngineError
from launcher.fleet.build import project_folder
from launcher.hosts.access import PathState, look_at_reads, look_at_runs, state_of
from launcher.hosts.files import DiskSpace, disk_space
from launcher.hosts.runs_folder import check_runs
from launcher.hosts.this_machine import ThisMachine
from launcher.options.request import TRAINER_IN_IMAGE, Entrypoint, Request
from launcher.options.training_args import TrainingArgs, prepare_args
from launcher.parallel import in_parallel
from launcher.plan.access import check_data, check_runs_access, check_secret_file, may
from launcher.plan.check import check, check_disk, check_driver, check_study_address
from launcher.plan.facts import Facts
from launcher.plan.plan import Plan, make_plan
from launcher.problems import Problems, SeveralProblems, raise_all
from starling.core.errors import CheckpointError, DataError, StarlingError, UsageError
from starling.core.units import GIB
from tests.conftest import PYTHON_PATH, REPOSITORY
from tests.doubles.docker_engine import EngineDouble, served

STRANGER = "12345:12345"
"""A user whom no file of these tests belongs to."""


def launcher(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": PYTHON_PATH, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# --- several problems at once


def refuse(error: StarlingError) -> None:
    raise error


def test_one_problem_is_raised_as_it_is_and_none_is_silent() -> None:
    problems = Problems()
    problems.raise_any()
    assert problems.check(lambda: 7) == 7
    assert problems.check(refuse, DataError("no data")) is None
    with pytest.raises(DataError, match=r"^no data$"):
        problems.raise_any()


def test_all_problems_are_told_and_the_users_file_gives_the_exit_code() -> None:
    problems = Problems()
    for error in (
        UsageError("--memory lots"),
        EngineError("no image"),
        DataError("gone.yaml: no such file\nlook"),
    ):
        problems.check(refuse, error)
    with pytest.raises(
        SeveralProblems, match=r"(?s)3 problems.*1\. --memory.*2\. no image.*3\. gone\.yaml"
    ) as caught:
        problems.raise_any()
    assert caught.value.exit_code == 3
    around = Problems()
    around.check(problems.raise_any)
    assert around.found == problems.found, "a list in a list would be numbered twice"


def test_a_path_that_the_caller_may_not_look_at_is_a_problem_like_any_other() -> None:
    problems = Problems()
    problems.check(refuse, PermissionError(13, "Permission denied", "/shut/x"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^/shut/x: you may not access it; ask its owner"):
        problems.raise_any()


def test_whatever_becomes_of_one_thread_the_others_do_their_part() -> None:
    together = threading.Barrier(3, timeout=10)  # nobody passes unless all three run at once

    def act(number: int) -> int:
        together.wait()
        if number == 1:
            raise DataError("one")
        return number * 10

    outcomes = in_parallel(act, [0, 1, 2])
    assert [outcome.item for outcome in outcomes] == [0, 1, 2]
    assert [outcomes[0].value, outcomes[2].value] == [0, 20]
    with pytest.raises(DataError):
        _ = outcomes[1].value


def test_a_command_line_with_four_mistakes_names_all_four(tmp_path: Path) -> None:
    done = launcher(
        "up", "--engine", "local", "--cpu", "1", "--memory", "lots", "--env", "NOT_SET_ANYWHERE", "--", "--data", "gone.yaml",
        "--hyp", "gone-too.yaml", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3
    for words in (
        "4 problems",
        "--data gone.yaml",
        "--hyp gone-too.yaml",
        "--memory lots",
        "NOT_SET_ANYWHERE",
    ):
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- the engine


class OldEngine(EngineDouble):
    """A double of an engine from before 20.10: it answers /_ping and /version, and nothing else."""

    api_version = "1.40"

    def content(self) -> tuple[int, bytes]:
        document = {"Version": "19.03.15", "ApiVersion": "1.40", "MinAPIVersion": "1.12"}
        return 200, json.dumps(document).encode() if self.path.endswith("/version") else b"OK"


@pytest.fixture
def old_engine() -> Iterator[str]:
    with served(OldEngine) as path:
        yield f"unix://{path}"


def test_an_engine_that_is_too_old_is_named_with_its_version(old_engine: str, tmp_path: Path) -> None:
    done = launcher("up", "--cpu", "1", "--", "--name", "x", cwd=tmp_path, DOCKER_HOST=old_engine)
    assert done.returncode == 5
    assert "too old: 19.03.15, API 1.40; this launcher needs 20.10 (API 1.41) or newer" in done.stderr
    assert list(tmp_path.iterdir()) == []


def refused_as_nobody(act: Callable[[], object]) -> str:
    """Return the words of the launcher's error that `act` raises for a user without any group."""
    # Here, as the interpreter and these sources may be root's alone, and are imported when an error is put into words.
    importlib.import_module("launcher.engines.docker.checks")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing was refused"
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            act()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


@as_root
@pytest.mark.parametrize("group", ["audio", "root"])
def test_a_socket_without_permission_names_the_group_that_has_it(
    group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.engines.docker.docker import DockerEngine

    with (
        tempfile.TemporaryDirectory(prefix="starling-", dir="/tmp") as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        os.chmod(folder, 0o755)
        path = f"{folder}/docker.sock"
        listener.bind(path)
        listener.listen()
        os.chown(path, 0, grp.getgrnam(group).gr_gid)
        os.chmod(path, 0o660)
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        said = refused_as_nobody(lambda: DockerEngine(65534, ThisMachine()))
    assert said.startswith(f"EngineError: Docker's socket {path}: permission denied; ")
    if group == "root":
        assert "only root may use it" in said
        assert "usermod" not in said
    else:
        assert "it is for group audio: sudo usermod -aG audio $USER, then log in again" in said


@as_root
def test_paths_that_the_caller_may_not_look_at_are_told_and_no_traceback(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    runs = tmp_path / "runs"
    assert refused_as_nobody(lambda: check_runs(runs)).startswith(
        f"UsageError: --runs {runs}: you may not access it"
    )
    for option, kind in (("--data", "DataError"), ("--weights", "CheckpointError"), ("--hyp", "UsageError")):
        words = [option, str(tmp_path / "x.pt")]
        said = refused_as_nobody(
            lambda words=words: prepare_args(
                words, cwd=Path("/"), runs=runs, runs_inside="/runs", isolated=True
            )
        )
        assert said.startswith(
            f"{kind}: {option} {tmp_path}/x.pt: you may not access {tmp_path}/x.pt; ask its owner"
        )


# --- driver and image


def test_the_image_says_which_cuda_its_torch_was_built_for() -> None:
    import torch

    if torch.version.cuda is None:
        pytest.skip("torch without CUDA is installed here")
    assert f"ARG CUDA={torch.version.cuda}\n" in (REPOSITORY / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("cuda", "driver", "fits"),
    [
        ("13.0", (13, 0), True),
        ("13.2", (13, 0), True),  # minor-version compatibility
        ("12.8", (13, 0), True),
        ("13.0", (12, 8), False),
        ("14.1", (13, 0), False),
        (None, (11, 0), True),
        ("cpu", (11, 0), True),
        ("13.0", None, True),
    ],
)
def test_a_driver_too_old_for_the_images_cuda_is_refused_and_the_unknown_is_not(
    cuda: str | None, driver: tuple[int, int] | None, fits: bool
) -> None:
    image = Image(name="starling", id="x", cuda=cuda)
    seen = Driver("570.86.15", driver) if driver else None
    if fits:
        check_driver(image, seen)
        return
    with pytest.raises(
        EngineError, match=r"CUDA 1[34]\.\d and this machine's NVIDIA driver 570.86.15 .* install"
    ):
        check_driver(image, seen)


def test_the_remedy_for_cuda_13_is_the_driver_branch_that_brought_it() -> None:
    with pytest.raises(EngineError, match="install driver 580 or newer, or use an image built for CUDA 12"):
        check_driver(Image(name="starling", id="x", cuda="13.0"), Driver("570.86.15", (12, 8)))


# --- disk, addresses, memory


def test_a_disk_that_is_all_but_full_is_told_with_what_it_has(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    check_disk(runs, disk_space(runs))
    with pytest.raises(UsageError, match=r"--runs .*/runs: 512 MB free on its disk, .*make room"):
        check_disk(runs, DiskSpace(GIB // 2))
    with pytest.raises(UsageError, match="its disk takes only 7 more files; remove some"):
        check_disk(runs, DiskSpace(GIB, files=7))
    check_disk(runs, DiskSpace(GIB, files=None))


def test_shared_memory_beyond_the_memory_that_it_counts_against_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--shm 4 GB: .* counts against --memory, 2 GB"):
        plan(tmp_path, memory_bytes=2 * GIB, shm_bytes=4 * GIB)
    plan(tmp_path, memory_bytes=2 * GIB, shm_bytes=2 * GIB)


@pytest.mark.parametrize(
    ("url", "network", "fits"),
    [
        ("postgresql://me@localhost:5432/study", "bridge", False),
        ("postgresql+pg8000://me@127.0.0.1/study", "starling", False),
        ("postgresql://me@[::1]/study", "none", False),
        ("postgresql://me@localhost/study", "host", True),
        ("postgresql://me@db/study", "bridge", True),
        ("journal.log", "bridge", True),
        ("http://[", "bridge", True),
        ("", "bridge", True),
    ],
)
def test_a_study_at_an_address_that_means_the_container_itself_is_refused(
    url: str, network: str, fits: bool
) -> None:
    if fits:
        check_study_address(url, network)
        return
    with pytest.raises(UsageError, match="is the replica itself, not this machine"):
        check_study_address(url, network)


MACHINE = Machine(cores=(0, 1), memory_bytes=8 * GIB)


def request(tmp_path: Path, **asked: object) -> Request:
    args = prepare_args(
        ["--name", "x"], cwd=tmp_path, runs=tmp_path / "runs", runs_inside="/runs", isolated=True
    )
    values: dict[str, object] = {"args": args, "runs": tmp_path / "runs", "cpus": 1, "user": "1000:1000"}
    entrypoint = Entrypoint(trainer=TRAINER_IN_IMAGE, runs_inside="/runs", isolated=True)
    return Request(**{**values, "entrypoint": entrypoint, **asked})  # type: ignore[arg-type]


def plan(tmp_path: Path, *others: ReplicaState, **asked: object) -> Plan:
    facts = Facts(machine=MACHINE, image=Image(id="sha256:abc"), others=others)
    made = make_plan(request(tmp_path, **asked), facts)
    raise_all(check(made, facts))
    return made


def test_a_tracker_on_loopback_is_noted_without_its_password(tmp_path: Path) -> None:
    passed = {
        "MLFLOW_TRACKING_URI": "http://me:hunter2@127.0.0.1:5000",
        "CLEARML_API_HOST": "https://clearml.lab:8008",
        "MLFLOW_RUN": "localhost",
    }
    [note] = plan(tmp_path, passed=passed).notes
    assert note.startswith("MLFLOW_TRACKING_URI: 127.0.0.1:5000 is the replica itself")
    assert "say --tracking" in note
    assert "hunter2" not in note
    assert plan(tmp_path, passed=passed, network="host").notes == ()


def test_memory_that_other_fleets_may_take_is_noted(tmp_path: Path) -> None:
    other = ReplicaState(id="1", name="o", fleet="o/p", device="cpu:0", phase="running", memory_bytes=6 * GIB)
    [note] = plan(tmp_path, other, memory_bytes=4 * GIB).notes
    assert "may take 6 GB, this one 4 GB, and the machine has 8 GB" in note
    assert plan(tmp_path, other, memory_bytes=2 * GIB).notes == ()


# --- data and runs folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset that everybody may read; returns its YAML."""
    root = tmp_path / "blood"
    for kind, suffix in (("images", ".jpg"), ("labels", ".txt")):
        folder = root / kind / "train"
        folder.mkdir(parents=True)
        (folder / f"1{suffix}").write_text("")
    (root / "blood.yaml").write_text("path: .\ntrain: images/train\nval: images/train\nnames: [a]\n")
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root / "blood.yaml"


def check_args(args: TrainingArgs, user: str = STRANGER) -> None:
    """Look at what a training opens, and judge it."""
    shown = [Path(mount.source) for mount in args.mounts]
    check_data(look_at_reads(args.reads, shown), shown, user)


def check_dataset(dataset: Path, user: str = STRANGER) -> None:
    args = prepare_args(
        ["--data", str(dataset)],
        cwd=dataset.parent,
        runs=Path("/nowhere"),
        runs_inside="/runs",
        isolated=True,
    )
    check_args(args, user)


def test_data_that_everybody_may_read_passes_whatever_lies_above_it(dataset: Path) -> None:
    dataset.parent.parent.chmod(0o700)  # Docker follows the path itself; inside, only what is mounted counts
    check_dataset(dataset)


@pytest.mark.parametrize("shut", ["", "images", "images/train", "images/train/1.jpg", "labels/train", "labels/train/1.txt", "blood.yaml"])  # fmt: skip
def test_data_that_the_containers_user_cannot_read_is_named_with_the_remedy(dataset: Path, shut: str) -> None:
    path = dataset.parent / shut
    path.chmod(0o700 if path.is_dir() else 0o600)
    words = f"{path}: replicas run as {STRANGER} and may not read it .*chmod -R o\\+rX {path}"
    with pytest.raises(DataError, match=words):
        check_dataset(dataset)
    check_dataset(dataset, f"{os.getuid()}:12345")


def test_a_file_that_training_does_not_open_is_nobodys_business(dataset: Path) -> None:
    for name in ("private", "images/train/.git"):
        (dataset.parent / name).touch(0o600)
    check_dataset(dataset)


def test_a_group_that_may_read_is_offered(dataset: Path) -> None:
    images = dataset.parent / "images"
    images.chmod(0o750)
    with pytest.raises(DataError, match=f"give --user 12345:{images.stat().st_gid}, the group that may"):
        check_dataset(dataset)


def test_a_folder_that_is_a_link_out_of_the_dataset_is_refused_since_replicas_cannot_follow_it(
    dataset: Path, tmp_path: Path
) -> None:
    labels = dataset.parent / "labels"
    labels.rename(tmp_path / "elsewhere")
    labels.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=f"{labels}: leads to {tmp_path}/elsewhere, which replicas do not see"
    ):
        check_dataset(dataset)
    labels.unlink()
    (tmp_path / "elsewhere").rename(dataset.parent / "real")
    labels.symlink_to("real")
    check_dataset(dataset)


def test_weights_that_cannot_be_read_are_a_checkpoint_error(tmp_path: Path) -> None:
    weights = tmp_path / "w.pt"
    weights.touch(0o600)
    with pytest.raises(CheckpointError, match=r"w\.pt: replicas run as"):
        check_data(look_at_reads({weights: CheckpointError}, [weights]), [weights], STRANGER)


@pytest.mark.parametrize(
    ("option", "error"),
    [("--cfg", UsageError), ("--hyp", UsageError), ("--space", UsageError), ("--hooks", UsageError),
     ("--weights", CheckpointError)],
)  # fmt: skip
def test_an_unreadable_file_is_the_error_that_the_trainer_would_make_of_it(
    option: str, error: type[StarlingError], tmp_path: Path
) -> None:
    path = tmp_path / ("x.pt" if option == "--weights" else "x.yaml")
    path.write_text("cfg: [yolov5n.yaml]\n")
    path.chmod(0o600)
    args = prepare_args(
        ["--evolve", "2", option, str(path)],
        cwd=tmp_path,
        runs=tmp_path / "runs",
        runs_inside="/runs",
        isolated=True,
    )
    with pytest.raises(
        StarlingError, match=rf"{path}: replicas run as {STRANGER} and may not read it"
    ) as caught:
        check_args(args)
    assert type(caught.value) is error


def test_a_password_file_that_replicas_cannot_read_is_told_with_two_ways_out(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.touch(0o600)
    state = state_of(path)
    assert state is not None
    check_secret_file(state, "STARLING_STUDY_PASSWORD_FILE", f"{os.getuid()}:5")
    with pytest.raises(UsageError, match=rf"setfacl -m u:12345:r {path}, or give --user {os.getuid()}:"):
        check_secret_file(state, "STARLING_STUDY_PASSWORD_FILE", STRANGER)


def test_root_in_a_container_has_no_right_beyond_its_mode() -> None:
    state = PathState(Path("/x"), uid=1000, gid=1000, mode=0o100600)
    assert not may(state, 0, 0, 4)
    assert may(state, 1000, 5, 6)
    assert may(replace(state, has_list=True), 0, 0, 4), "an access control list may allow it"


def test_a_runs_folder_that_the_containers_user_cannot_write_is_named_with_the_remedy(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    mine = f"{os.getuid()}:{os.getgid()}"

    def check_access(user: str, caller: int) -> None:
        check_runs_access(runs, look_at_runs(runs, "a/b"), user, caller)

    with pytest.raises(UsageError, match="would be made by you"):
        check_access(STRANGER, caller=999)
    check_access(STRANGER, caller=0)  # root gives away what it makes
    (runs / "a" / "b").mkdir(parents=True)
    check_access(mine, caller=os.getuid())
    for path, more in ((runs, 0o755), (runs / "a", 0o755), (runs / "a" / "b", 0o755)):
        path.chmod(more)
        with pytest.raises(UsageError, match=rf"may not write in {path} .*chown -R {STRANGER} {path}"):
            check_access(STRANGER, caller=999)
        path.chmod(0o777)
    check_access(STRANGER, caller=999)


# --- the image's build


def test_the_projects_folder_is_the_packages_own_or_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project_folder(tmp_path) == REPOSITORY
    monkeypatch.setattr(
        "launcher.fleet.build.__file__", str(tmp_path / "site-packages/launcher/fleet/build.py")
    )
    assert project_folder(REPOSITORY / "docs") == REPOSITORY
    with pytest.raises(UsageError, match="run it in the project's folder"):
        project_folder(tmp_path)


def test_build_makes_no_sense_for_processes(tmp_path: Path) -> None:
    done = launcher("up", "--engine", "local", "--cpu", "1", "--build", "--", "--name", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert "--build: makes an image, and --engine local needs none" in done.stderr
