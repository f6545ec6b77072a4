"""Several processes train one model: the same numbers as one, and an end that all share. Real processes over Gloo."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from starling.cli import train
from starling.core.errors import UsageError
from starling.core.settings.train import TrainConfig
from starling.distributed.group import Rank
from starling.distributed.heartbeat import LOST_S, SUSPECT_S, Heartbeat, LostRank
from starling.distributed.relaunch import relaunch
from starling.model.checkpoint import load_checkpoint
from tests.conftest import PYTHON_PATH, REPOSITORY

STILL_NORMS = """\
# The trainer with BatchNorm as in evaluation: what is left must not depend on how a batch is split.
import sys
import torch
from starling.cli import train
from starling.cli.command import leave
from starling.core.settings.train import TrainConfig
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
leave(train.main(sys.argv[1:]))
"""
LOSSES = [
    "train/box_loss",
    "train/obj_loss",
    "train/cls_loss",
    "val/box_loss",
    "val/obj_loss",
    "val/cls_loss",
]
METRICS = ["metrics/precision", "metrics/recall", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95"]


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    from starling import settings

    settings.update({"mlflow": False, "tensorboard": False})


@pytest.fixture
def still(tmp_path: Path) -> str:
    """Return a script that trains with BatchNorm held still."""
    path = tmp_path / "still.py"
    path.write_text(STILL_NORMS)
    return str(path)


def environment(**changes: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    return {
        **inherited,
        "PYTHONPATH": PYTHON_PATH,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **changes,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(*words: str, processes: int = 2) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
            "--master_port", str(free_port()), *words]  # fmt: skip


def run(command: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(**changes), cwd=REPOSITORY, capture_output=True, text=True, timeout=240
    )


class Ranks:
    """Ranks started by hand, as Slurm or Kubernetes would: no torchrun that ends the others."""

    def __init__(self, arguments: list[str], count: int = 2) -> None:
        self.port = free_port()
        self.processes = [
            subprocess.Popen(
                [sys.executable, "app/train.py", *arguments],
                env=environment(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port)),
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for rank in range(count)
        ]  # fmt: skip

    def wait_for_epoch(self) -> None:
        """Return when rank 0 has told of its first epoch."""
        stream = self.processes[0].stdout
        assert stream is not None
        lines = []
        for line in stream:
            lines.append(line)
            if line.startswith("epoch 1/"):
                return
        raise AssertionError("".join(lines))

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def endless(tiny_args: list[str], runs: Path) -> Iterator[Ranks]:
    """Yield two ranks in the middle of a training that would go on for long."""
    ranks = Ranks([*tiny_args, "--epochs", "100000", "--noplots", "--nosave", "--noval"])
    try:
        ranks.wait_for_epoch()
        yield ranks
    finally:
        ranks.end()


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


def assert_same_course(one: Path, two: Path, epochs: int) -> None:
    assert len(rows(one)) == len(rows(two)) == epochs
    for ours, theirs in zip(rows(one), rows(two), strict=True):
        for column in LOSSES:
            assert float(ours[column]) == pytest.approx(float(theirs[column]), abs=1e-4), column
        for column in METRICS:
            assert float(ours[column]) == pytest.approx(float(theirs[column]), abs=1e-4), column
    first, second = (load_checkpoint(folder / "weights" / "last.pt")["model"] for folder in (one, two))
    worst = max(
        float((first[key] - second[key]).abs().max()) for key in first if first[key].is_floating_point()
    )
    assert worst < 1e-4


@pytest.mark.slow
def test_two_processes_take_the_course_of_one(tiny_args: list[str], runs: Path, still: str) -> None:
    # Eight images in batches of 6 and 2, parts of 3 and 1. Labels fall unevenly on them: a mean of means would show.
    common = [*tiny_args, "--epochs", "3", "--amp", "off", "--noplots", "--batch", "6"]
    alone = run([sys.executable, still, *common, "--name", "one"])
    assert alone.returncode == 0, alone.stderr
    together = run(torchrun(still, *common, "--name", "two"))
    assert together.returncode == 0, together.stderr
    assert_same_course(runs / "train" / "one", runs / "train" / "two", epochs=3)
    assert together.stdout.count("epoch 3/3") == 1
    assert not (runs / "train" / "two2").exists()


@pytest.mark.slow
def test_a_rank_without_an_image_in_the_last_batch_keeps_in_step(
    tiny_args: list[str], runs: Path, still: str, tiny_data: Path
) -> None:
    # Five images in batches of 4: the last one has a single image for two ranks, as has the validation.
    root = runs.parent / "five"
    shutil.copytree(tiny_data.parent, root)
    for split, left in (("train", 5), ("val", 1)):
        for image in sorted((root / "images" / split).iterdir())[left:]:
            image.unlink()
    common = [*tiny_args, "--data", str(root / "bccd.yaml"), "--amp", "off", "--noplots"]
    assert run([sys.executable, still, *common, "--name", "one"]).returncode == 0
    together = run(torchrun(still, *common, "--name", "two"))
    assert together.returncode == 0, together.stderr
    assert_same_course(runs / "train" / "one", runs / "train" / "two", epochs=2)


@pytest.mark.slow
def test_a_list_of_devices_starts_its_own_processes_stops_and_resumes(
    tiny_args: list[str], runs: Path
) -> None:
    command = [sys.executable, "app/train.py", *tiny_args[:-1], "cpu,cpu"]
    process = subprocess.Popen([*command, "--epochs", "500", "--noplots"], env=environment(), cwd=REPOSITORY, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(240) == 143, rest
    assert "Traceback" not in rest
    last = runs / "train" / "exp" / "weights" / "last.pt"
    done = load_checkpoint(last)["epoch"]
    resumed = run([sys.executable, "app/train.py", "--resume", str(last), "--epochs", str(done + 2)])
    assert resumed.returncode == 0, resumed.stderr
    assert "2 processes" in resumed.stdout
    assert len(rows(runs / "train" / "exp")) == done + 2


@pytest.mark.slow
def test_a_stop_asked_of_one_rank_stops_all_after_saving(endless: Ranks, runs: Path) -> None:
    endless.processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(120) for process in endless.processes] == [143, 143]
    assert load_checkpoint(runs / "train" / "exp" / "weights" / "last.pt")["kind"] == "resumable"


@pytest.mark.slow
@pytest.mark.parametrize(("dead", "sign"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_the_others_end_within_a_minute_and_name_a_lost_rank(
    endless: Ranks, dead: int, sign: signal.Signals
) -> None:
    lost, other = endless.processes[dead], endless.processes[1 - dead]
    lost.send_signal(sign)
    started = time.monotonic()
    output, _ = other.communicate(timeout=60)
    assert time.monotonic() - started < 60
    assert other.returncode not in (0, None)
    assert f"error: rank {dead} (" in output
    assert "Traceback" not in output
    assert "frame #" not in output, "torch's own words about each try to reach the lost one"
    if dead == 1:  # the other one heard from it
        assert f"process {lost.pid} on {socket.gethostname()}" in output


@pytest.mark.slow
def test_torchrun_ends_the_rest_of_a_killed_rank_and_its_name_is_told(
    tiny_args: list[str], runs: Path
) -> None:
    command = torchrun("app/train.py", *tiny_args, "--epochs", "100000", "--noplots", "--nosave", "--noval")
    process = subprocess.Popen(command, env=environment(), cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    ranks = [int(name) for name in _children(process.pid) if b"train.py" in _command(int(name))]
    by_rank = {_environment(pid)["RANK"]: pid for pid in ranks}
    os.kill(by_rank["1"], signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert f"error: rank 1 (process {by_rank['1']} on {socket.gethostname()}) is gone" in output


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


@pytest.mark.slow
def test_a_rank_that_fails_tells_its_reason_through_rank_0(tiny_args: list[str], runs: Path) -> None:
    commands = [
        [*tiny_args, "--noplots"],
        [*tiny_args, "--noplots", "--device", "cpu", "--data", str(_broken(runs))],
    ]
    port = str(free_port())
    processes = [
        subprocess.Popen([sys.executable, "app/train.py", *words], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT,
                         env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
        for rank, words in enumerate(commands)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [3, 3], outputs
    assert "error: rank 1 (" in outputs[0]
    assert "nothing-here" in outputs[0]
    assert outputs[1].strip() == ""


def _broken(runs: Path) -> Path:
    path = runs.parent / "broken.yaml"
    path.write_text(
        f"path: {runs.parent}\ntrain: nothing-here\nval: nothing-here\nnames: [RBC, WBC, Platelets]\n"
    )
    return path


@pytest.mark.slow
def test_a_taken_port_is_named_with_its_remedy(tiny_args: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        alone = run([sys.executable, "app/train.py", *tiny_args[:-1], "cpu,cpu"], MASTER_PORT=port)
        by_hand = run([sys.executable, "app/train.py", *tiny_args],
                      RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # fmt: skip
    for result in (alone, by_hand):
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert port in result.stderr
        assert "taken" in result.stderr
        assert "MASTER_PORT" in result.stderr


@pytest.mark.slow
def test_two_hosts_train_together(tiny_args: list[str], runs: Path) -> None:
    port, words = "29511", [*tiny_args, "--noplots", "--epochs", "1"]
    with two_hosts() as (first, second):
        processes = []
        for number, (namespace, interface) in enumerate((first, second)):
            command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                       "--node_rank", str(number), "--master_addr", "10.231.7.1", "--master_port", port,
                       "--nproc_per_node", "1", "app/train.py", *words]  # fmt: skip
            variables = environment(GLOO_SOCKET_IFNAME=interface, STARLING_RUNS=str(runs / str(number)))
            processes.append(subprocess.Popen(command, env=variables, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
                                              stderr=subprocess.STDOUT))  # fmt: skip
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "epoch 1/1" in outputs[0]
    assert "epoch 1/1" not in outputs[1]
    assert (runs / "0" / "train" / "exp" / "weights" / "best.pt").is_file()
    assert not (runs / "1" / "train").exists()


class two_hosts:  # noqa: N801
    """Two network namespaces joined by a cable; skips where they cannot be made."""

    def __enter__(self) -> tuple[tuple[str, str], tuple[str, str]]:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("needs root and iproute2")
        tag = uuid.uuid4().hex[:6]
        self.names = (f"star{tag}a", f"star{tag}b")
        ends = (f"v{tag}a", f"v{tag}b")
        try:
            for name in self.names:
                _ip("netns", "add", name)
            _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for number, (name, end) in enumerate(zip(self.names, ends, strict=True), start=1):
                _ip("link", "set", end, "netns", name)
                _ip("-n", name, "addr", "add", f"10.231.7.{number}/24", "dev", end)
                _ip("-n", name, "link", "set", end, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            pytest.skip(f"no network namespaces here: {error.stderr}")
        return (self.names[0], ends[0]), (self.names[1], ends[1])

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def test_stopped_processes_are_left_the_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.launcher import api

    given: list[api.LaunchConfig] = []
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # which it would set for good

    def stopped(config: api.LaunchConfig, entrypoint: str) -> None:
        given.append(config)
        raise api.SignalException("stopped", signal.SIGTERM)

    monkeypatch.setattr(api, "elastic_launch", stopped)
    assert relaunch([], 2) == 143
    assert given[0].shutdown_timeout is not None
    assert given[0].shutdown_timeout > 60, "the launcher's grace, which is to be the limit"


# --- without other processes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "cpu,cpu", "--batch", "5"], "--batch-size 4"),
        (["--device", "0,1,2", "--batch", "16"], "--batch-size 15"),
        (["--device", "0,1", "--batch", "1"], "--batch-size 2"),
        (["--device", "0,cpu"], "not on both"),
        (["--device", "1,1"], "twice"),
        (["--device", "0,1", "--evolve", "3"], "launcher up --gpus"),
    ],
)
def test_devices_that_do_not_add_up_are_refused(
    tiny_args: list[str], runs: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert train.main([*tiny_args, *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (runs / "train").exists()


def place(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        **changes,
    }.items():
        monkeypatch.setenv(name, value)


def test_a_search_under_torchrun_is_refused(
    tiny_args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch)
    assert train.main([*tiny_args, "--evolve", "2"]) == 2
    assert "one worker a device" in capsys.readouterr().err


def test_an_uneven_batch_under_torchrun_is_told_by_rank_0_alone(
    tiny_args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        place(monkeypatch, RANK=rank)
        assert train.main([*tiny_args, "--batch", "7"]) == 2
        assert capsys.readouterr().err.count("nearest that can is --batch-size 8") == lines


def test_synchronised_norms_on_the_cpu_are_refused(
    tiny_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_args, "--sync-bn", "--noplots"]) == 2
    assert "leave it out on the CPU" in capsys.readouterr().err


def test_local_rank_is_accepted_and_ignored(tiny_args: list[str], runs: Path) -> None:
    assert train.main([*tiny_args, "--noplots", "--epochs", "1", "--local_rank", "0"]) == 0


@pytest.mark.parametrize(
    ("changes", "words"), [({"RANK": "x"}, "RANK='x'"), ({"RANK": "2"}, "below WORLD_SIZE=2")]
)
def test_a_place_that_makes_no_sense_is_refused(changes: dict[str, str], words: str) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1", **changes}
    with pytest.raises(UsageError, match=words):
        Rank.from_environment(given)


def test_a_process_alone_has_no_place() -> None:
    assert Rank.from_environment({}) is None
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert Rank.from_environment(alone) is None


class Board(dict[str, str]):
    """A store in memory."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key].encode() for key in keys]


def three_hearts() -> tuple[list[Heartbeat], list[float]]:
    board, now = Board(), [0.0]
    hearts = [
        Heartbeat(board, rank, 3, f"process {rank}", lambda lost: None, lambda: now[0]) for rank in range(3)
    ]
    for heart in hearts:
        heart.first()
    for heart in (*hearts, hearts[0]):  # which has to see the last one's beat
        heart._beat()
    return hearts, now


def test_a_heart_that_stands_still_is_named_and_one_that_ended_well_is_not() -> None:
    hearts, now = three_hearts()
    hearts[1].end(0)
    for _ in range(4):
        now[0] += LOST_S / 4
        hearts[0]._beat()
    assert hearts[0].find_lost(LOST_S) is None
    now[0] += SUSPECT_S
    hearts[0]._beat()
    lost = hearts[0].find_lost(LOST_S)
    assert lost is not None
    assert (lost.rank, lost.exit_code) == (2, 1)
    assert "rank 2 (process 2)" in lost.message


def test_a_rank_that_ended_in_a_failure_hands_on_its_reason_and_exit_code() -> None:
    hearts, _ = three_hearts()
    hearts[2].end(3, "no such image")
    hearts[0]._beat()
    assert hearts[0].find_lost(LOST_S) == LostRank(2, "rank 2 (process 2) ended: no such image", 3)
    assert hearts[0].speaks(LostRank(2, "", 1))
    assert not hearts[1].speaks(LostRank(2, "", 1))
    assert hearts[1].speaks(LostRank(0, "", 1))


def test_parts_of_a_batch_add_up_to_the_loss_of_the_whole() -> None:
    from starling.model.loss import DetectionLoss, LossGains, Share

    torch.manual_seed(0)
    anchors = torch.tensor([[[1.0, 1.5], [2.0, 1.0]]])
    loss = DetectionLoss((8.0,), anchors, 3, LossGains())
    raw = torch.randn(3, 2, 6, 6, 8, requires_grad=True)
    targets = torch.tensor([[0, 1, 0.3, 0.4, 0.2, 0.2], [1, 0, 0.6, 0.5, 0.3, 0.2], [2, 2, 0.7, 0.7, 0.2, 0.3],
                            [2, 1, 0.2, 0.8, 0.2, 0.2]])  # fmt: skip
    whole, whole_parts = loss([raw], targets)
    found = loss.match(0, raw.shape, targets, torch.tensor(4.0)).matched.float().sum()[None]
    total, parts = torch.zeros(()), torch.zeros(3)
    for images in ([0, 2], [1]):
        mine = torch.cat([targets[targets[:, 0] == image] for image in images])
        mine[:, 0] = torch.tensor([images.index(int(image)) for image in mine[:, 0]])
        share = Share(3, len(images) / 3, lambda own: found)
        one = loss([raw[images]], mine, share)
        total, parts = total + one[0], parts + one[1]
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(parts, whole_parts)


BREAKS = """\
# The trainer in which rank 1 alone sees a loss that is no number, once.
import os
import sys
from starling.cli import train
from starling.cli.command import leave
from starling.core.settings.train import TrainConfig
from starling.model.loss import DetectionLoss
healthy, calls = DetectionLoss.forward, []
def forward(self, *given):
    calls.append(1)
    total, parts = healthy(self, *given)
    broken = os.environ["RANK"] == "1" and len(calls) == 2
    return (total * float("nan"), parts * float("nan")) if broken else (total, parts)
DetectionLoss.forward = forward
leave(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_rank_sends_all_back(
    tiny_args: list[str], runs: Path, tmp_path: Path
) -> None:
    script = tmp_path / "breaks.py"
    script.write_text(BREAKS)
    done = run(torchrun(str(script), *tiny_args, "--noplots"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the loss is no longer a number; going on from") == 1
    (folder,) = (runs / "train").iterdir()
    assert len(rows(folder)) == 2


def test_a_batch_that_is_to_be_measured_needs_a_single_device() -> None:
    with pytest.raises(UsageError, match="is measured on one device"):
        TrainConfig(device="0,1", batch_size=-1)
