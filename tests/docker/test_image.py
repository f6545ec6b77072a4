"""The trainer's image: who it runs as, what it writes, and that it trains."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TINY_LAYOUT
from tests.docker.conftest import REPOSITORY, docker

pytestmark = pytest.mark.docker

INSIDE = "/usr/src/app/runs"
TRAIN = [
    "--img", "64", "--batch", "4", "--epochs", "1", "--data", "bccd.yaml", "--weights", "", "--cfg", "yolov5n.yaml",
    "--device", "cpu",
]  # fmt: skip


SEARCH = ["--img", "64", "--batch", "16", "--epochs", "1", "--data", "bccd.yaml", "--weights", ""]


def as_root() -> bool:
    return os.geteuid() == 0


def test_without_a_mount_the_command_runs_as_an_ordinary_user_without_capabilities(
    trainer_image: str,
) -> None:
    answer = docker(
        "run", "--rm", trainer_image, "sh", "-c", "id -u; grep CapBnd /proc/self/status; touch runs/here"
    )

    assert answer.returncode == 0, answer.stderr
    uid, capabilities = answer.stdout.strip().splitlines()
    assert uid == "1000"
    assert capabilities.split()[1].strip("0") == ""


def test_the_built_image_tells_the_commit_it_was_built_of(trainer_image: str) -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("these sources are no clone")
    asked = '{{index .Config.Labels "org.opencontainers.image.revision"}} {{.Config.Env}}'

    revision, _, environment = docker("image", "inspect", "-f", asked, trainer_image).stdout.partition(" ")

    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", revision)
    assert f"STARLING_COMMIT={revision}" in environment


def test_unknown_user_id_can_write_runs_and_has_a_name_and_a_home(trainer_image: str) -> None:
    script = "touch runs/here && python -c 'import getpass, pathlib; print(getpass.getuser(), pathlib.Path.home())'"

    answer = docker("run", "--rm", "--user", "54321:54321", trainer_image, "sh", "-c", script)

    assert answer.stdout.split() == ["starling", "/tmp"], answer.stderr


def test_a_file_that_is_mounted_below_roots_home_is_read_by_any_user(
    trainer_image: str, tmp_path: Path
) -> None:
    (tmp_path / "hyp.yaml").write_text("lr0: 0.01")
    mount = f"type=bind,source={tmp_path / 'hyp.yaml'},target=/root/blood/hyp.yaml,readonly"
    words = [
        "run",
        "--rm",
        "--user",
        "54321:54321",
        "--mount",
        mount,
        trainer_image,
        "cat",
        "/root/blood/hyp.yaml",
    ]

    assert docker(*words).stdout == "lr0: 0.01"


def test_a_hardened_replica_can_translate_kernels_for_the_model_and_for_triton(trainer_image: str) -> None:
    # As the launcher mounts it: what is translated into /tmp is also run from there.
    limits = [
        "--read-only",
        "--tmpfs",
        "/tmp:exec",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
    ]
    script = (
        "import subprocess, sysconfig, torch\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.SiLU())\n"
        "images = torch.rand(1, 3, 9, 9)\n"
        "torch.testing.assert_close(torch.compile(model)(images), model(images))\n"
        "headers = sysconfig.get_paths()['include']\n"  # Triton's launcher is a module of C
        "source = b'#include <Python.h>'\n"
        "command = ['gcc', '-I', headers, '-x', 'c', '-c', '-', '-o', '/tmp/module.o']\n"
        "subprocess.run(command, input=source, check=True)\n"
    )

    answer = docker(
        "run", "--rm", "--user", "54321:54321", *limits, trainer_image, "python", "-c", script, timeout_s=300
    )

    assert answer.returncode == 0, answer.stderr


def test_hardened_container_starts(trainer_image: str) -> None:
    limits = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]

    answer = docker(
        "run", "--rm", "--user", "54321:54321", *limits, trainer_image, "python", "train.py", "--help"
    )

    assert answer.returncode == 0, answer.stderr
    assert "--evolve" in answer.stdout


def test_paths_of_the_older_trainers_command_lines_exist(trainer_image: str) -> None:
    answer = docker("run", "--rm", trainer_image, "test", "-f", "/usr/src/app/data/hyps/hyp.finetune.yaml")

    assert answer.returncode == 0


def test_image_holds_no_sources_beside_the_trainer(trainer_image: str) -> None:
    answer = docker("run", "--rm", trainer_image, "ls", "/usr/src", "/usr/src/datasets")

    assert set(answer.stdout.split()) == {"/usr/src:", "app", "datasets", "/usr/src/datasets:", "bccd-mini"}


@pytest.mark.slow
def test_the_old_loops_command_trains_and_leaves_results_owned_by_the_folders_owner(
    trainer_image: str, tmp_path: Path
) -> None:
    folder = tmp_path / "gbr" / "runs"
    folder.mkdir(parents=True)
    owner = 54321 if as_root() else os.geteuid()
    os.chown(folder, owner, -1)

    answer = docker(
        "run", "--rm", "--ipc=host", "-v", f"{folder}:{INSIDE}", trainer_image,
        "python", "/usr/src/app/train.py", *TRAIN, "--hyp", "/usr/src/app/data/hyps/hyp.finetune.yaml",
        "--project", "gbr", "--name", "one", timeout_s=300,
    )  # fmt: skip

    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    run = folder / "gbr" / "one"
    assert (run / "weights" / "last.pt").stat().st_size > 1_000_000
    assert len((run / "results.csv").read_text().splitlines()) == 2
    assert {path.stat().st_uid for path in folder.rglob("*")} == {owner}


@pytest.mark.slow
def test_trainer_trains_as_any_user_that_owns_its_runs_folder(trainer_image: str, tmp_path: Path) -> None:
    owner = 12345 if as_root() else os.geteuid()
    os.chown(tmp_path, owner, -1)

    answer = docker(
        "run", "--rm", "--user", f"{owner}:{owner}", "--cap-drop", "ALL", "-v", f"{tmp_path}:{INSIDE}", trainer_image,
        "python", "train.py", *TRAIN, timeout_s=300,
    )  # fmt: skip

    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    assert (tmp_path / "train" / "exp" / "results.csv").stat().st_uid == owner


needs_root = pytest.mark.skipif(not as_root(), reason="only root can make a folder of root")
NOBODY, STRANGER = 10001, 12345


def roots_folder(tmp_path: Path, kind: str) -> Path:
    """Return a runs folder of root's: one that Docker makes, an empty one, or one with an older version's results."""
    runs = tmp_path / "runs"
    os.chmod(tmp_path, 0o755)
    if kind != "missing":
        runs.mkdir(mode=0o755)
    if kind == "with results":
        (runs / "gbr/search").mkdir(parents=True)
        (runs / "gbr/search/evolve.csv").write_text("lr0\n0.01\n")
        (runs / "gbr/search/shell").touch()
        (runs / "gbr/search/shell").chmod(0o4755)
    return runs


@needs_root
@pytest.mark.parametrize("kind", ["missing", "empty", "with results"])
def test_a_runs_folder_of_roots_is_handed_over_and_the_trainer_is_never_root(
    kind: str, trainer_image: str, tmp_path: Path
) -> None:
    runs = roots_folder(tmp_path, kind)
    script = "touch runs/here && id -u && id -g && grep CapEff /proc/self/status"
    answers = [
        docker("run", "--rm", "-v", f"{runs}:{INSIDE}", trainer_image, "sh", "-c", script) for _ in range(2)
    ]
    for answer in answers:
        assert answer.returncode == 0, answer.stderr
        uid, gid, _, capabilities = answer.stdout.split()
        assert (uid, gid, int(capabilities, 16)) == (str(NOBODY), str(NOBODY), 0)
    assert "trainers never run as root" in answers[0].stderr
    assert answers[1].stderr == ""
    assert {path.lstat().st_uid for path in (runs, *runs.rglob("*"))} == {NOBODY}
    assert {path.lstat().st_mode & 0o6000 for path in runs.rglob("*")} == {0}
    assert runs.stat().st_mode & 0o7777 == 0o700


@needs_root
@pytest.mark.parametrize("kind", ["missing", "empty", "with results", "a user's"])
def test_a_set_user_id_program_made_inside_gives_another_user_of_the_host_nothing_of_roots(
    kind: str, trainer_image: str, tmp_path: Path
) -> None:
    runs = roots_folder(tmp_path, kind)
    if kind == "a user's":
        os.chown(runs, 54321, 54321)
    script = "cp /bin/bash runs/shell && chmod 4755 runs/shell && ls -l runs/shell"
    made = docker("run", "--rm", "-v", f"{runs}:{INSIDE}", trainer_image, "sh", "-c", script)
    assert made.returncode == 0, made.stderr
    descriptor = os.open(runs.parent, os.O_PATH)  # whatever may be entered on the way there
    # Only the program that setpriv starts has lost root's capabilities: so that one starts the next.
    words = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", "/usr/bin/env"]
    tried = subprocess.run(
        [*words, f"/proc/self/fd/{descriptor}/runs/shell", "-p", "-c", 'echo "$EUID"'],
        pass_fds=[descriptor],
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(descriptor)
    if kind == "a user's":
        # This user opened the folder to all; a replica's supervisor takes the bit away at its end, the next `up` too.
        assert tried.stdout.strip() == "54321", tried.stderr
    else:
        assert (tried.returncode != 0, tried.stdout) == (True, ""), "the folder cannot be entered"


@needs_root
@pytest.mark.parametrize("writable", [True, False])
def test_roots_closed_home_is_read_and_never_written_by_a_trainer_that_is_not_root(
    writable: bool, trainer_image: str, tmp_path: Path
) -> None:
    home, runs = tmp_path / "home", tmp_path / "runs"
    home.mkdir(mode=0o700)
    (home / "weights.pt").write_text("weights")
    (home / ".bashrc").write_text("theirs")
    (home / "sudo").touch()
    (home / "sudo").chmod(0o4755)
    mounts = ["-v", f"{home}:/home/user{'' if writable else ':ro'}", "-v", f"{runs}:{INSIDE}"]
    script = (
        "cat /home/user/weights.pt; id -u; echo yes > runs/here; echo yes > /tmp/here; mv runs/here runs/there; "
        "cd /home/user; for act in 'echo evil > .bashrc' 'truncate -s 0 .bashrc' 'rm .bashrc' 'touch new' 'mkdir d' "
        "'ln -s x y' 'mv .bashrc z' 'chmod 4755 weights.pt' 'chown 10001 .bashrc' 'cp /bin/sh sudo' 'ln .bashrc hard' "
        "'mv .bashrc /usr/src/app/runs/' 'touch /usr/src/app/train.py' 'echo x > /usr/src/app/train.py'; do "
        'sh -c "$act" 2>/dev/null && echo "done: $act"; done; true'
    )
    answer = docker("run", "--rm", *mounts, trainer_image, "bash", "-c", script)
    assert answer.returncode == 0, answer.stderr
    allowed = {"done: touch /usr/src/app/train.py"}  # only its time
    assert set(answer.stdout.removeprefix("weights").split("\n")) - allowed == {str(NOBODY), ""}
    assert (home / ".bashrc").read_text() == "theirs"
    assert sorted(path.name for path in home.iterdir()) == [".bashrc", "sudo", "weights.pt"]
    assert (runs / "there").stat().st_uid == NOBODY


def test_root_without_the_capabilities_to_become_another_user_is_refused_and_runs_nothing(
    trainer_image: str,
) -> None:
    answer = docker("run", "--rm", "--cap-drop", "ALL", trainer_image, "echo", "ran")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "docker run --user UID:GID" in answer.stderr


@needs_root
def test_a_folder_that_root_may_not_give_away_is_refused_and_runs_nothing(
    trainer_image: str, tmp_path: Path
) -> None:
    words = ["--cap-drop", "CHOWN", "-v", f"{tmp_path / 'runs'}:{INSIDE}"]
    answer = docker("run", "--rm", *words, trainer_image, "echo", "ran")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "root_squash" in answer.stderr
    assert "Traceback" not in answer.stderr


@needs_root
def test_what_is_mounted_below_the_runs_folder_is_not_handed_over(trainer_image: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/secret").touch()
    mounts = ["-v", f"{tmp_path / 'runs'}:{INSIDE}", "-v", f"{tmp_path / 'data'}:{INSIDE}/data"]
    assert docker("run", "--rm", *mounts, trainer_image, "true").returncode == 0
    assert [(tmp_path / name).stat().st_uid for name in ("runs", "data", "data/secret")] == [NOBODY, 0, 0]


@pytest.mark.slow
def test_the_old_loop_of_docker_run_lines_cooperates_without_the_launcher(
    trainer_image: str, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.copyfile(TINY_LAYOUT, tmp_path / "tiny.yaml")
    containers = []
    try:
        for _ in range(2):
            started = docker(
                "run", "-d", "--ipc=host", "-v", f"{tmp_path}:/home/user", "-v", f"{runs}:{INSIDE}", trainer_image,
                "python", "/usr/src/app/train.py", *SEARCH, "--cfg", "/home/user/tiny.yaml",
                "--hyp", "/usr/src/app/data/hyps/hyp.finetune.yaml", "--workers", "8", "--device", "cpu",
                "--project", "gbr", "--name", "search", "--exist-ok", "--resume", "--evolve", "3",
            )  # fmt: skip
            assert started.returncode == 0, started.stderr
            containers.append(started.stdout.strip())
        codes = [docker("wait", container, timeout_s=600).stdout.strip() for container in containers]
        assert codes == ["0", "0"], "".join(docker("logs", container).stderr for container in containers)
        rows = (runs / "gbr" / "search" / "evolve.csv").read_text().splitlines()
        assert len(rows) == 1 + 3
    finally:
        docker("rm", "-f", *containers)
