"""`up --gpus` as it is typed, with real local replicas: NVML and the trainer are doubles, so no GPU works here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.devices.devices import Device
from launcher.engines.base import ReplicaSpec
from launcher.engines.local.local import LocalEngine
from launcher.hosts.lock import host_lock
from launcher.hosts.processes import caller_ids
from tests.conftest import PYTHON_PATH, REPOSITORY
from tests.trainer_double import write_double

TRAINER = """
import os, sys, time
print("sees", os.environ["CUDA_VISIBLE_DEVICES"], "args", *sys.argv[1:], flush=True)
time.sleep(60)
"""


class Home:
    """A user's folder on a machine with four GPUs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tag = uuid.uuid4().hex[:8]  # no other test's replicas are on these
        self.uuids = [f"GPU-{tag}-{n}" for n in range(4)]
        self.gpus: list[dict[str, Any]] = [
            {"uuid": self.uuids[n], "name": "H100", "memory": 2**36, "processes": []} for n in range(4)
        ]
        write_double(folder / "app", TRAINER)
        self.describe()

    def describe(self) -> None:
        (self.folder / "gpus.json").write_text(json.dumps({"gpus": self.gpus}))

    def start(self, *words: str, runs: str = "runs") -> subprocess.Popen[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("STARLING_")}
        own = {
            "PYTHONPATH": f"{REPOSITORY / 'tests' / 'doubles'}:{self.folder / 'app'}:{PYTHON_PATH}",
            "STARLING_NVML_DOUBLE": str(self.folder / "gpus.json"),
            "STARLING_ENGINE": "local",
            "STARLING_RUNS": str(self.folder / runs),
            "DOCKER_HOST": f"unix://{self.folder}/none",  # this machine's containers are not this test's
        }
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", *words],
            cwd=self.folder,
            env={**clean, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, runs: str = "runs") -> tuple[int, str, str]:
        process = self.start(*words, runs=runs)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def up(self, name: str, *words: str, runs: str = "runs") -> tuple[int, str, str]:
        return self(*up_words(name, *words), runs=runs)

    def engine(self, runs: str = "runs") -> LocalEngine:
        return LocalEngine(self.folder / runs, caller_ids()[0])

    def devices(self, runs: str = "runs") -> list[str]:
        return [state.device for state in self.engine(runs).list()]

    def said(self, count: int) -> list[str]:
        """Return the trainers' lines once there are so many, a while after they have started."""
        for _ in range(50):
            engine = self.engine()
            lines = [line for state in engine.list() for line in engine.logs(state.id)]
            if len(lines) >= count:
                return lines
            time.sleep(0.2)
        raise AssertionError(lines)


def up_words(name: str, *words: str) -> tuple[str, ...]:
    return ("up", *words, "--settle", "0", "--", "--project", "p", "--name", name, "--batch", "12")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    for engine in (home.engine("runs"), home.engine("others")):
        for state in engine.list():
            engine.remove(state.id)


def test_replicas_are_named_by_number_and_pinned_by_uuid(home: Home) -> None:
    code, _, error = home.up("a", "--gpus", f"1,{home.uuids[3]}", "--memory", "64m")
    assert code == 0, error
    assert home.devices() == ["gpu:1", "gpu:3"]
    assert re.search(r"p-a-gpu3 +GPU 3 +running", home("status")[1])
    shown = json.loads(home.up("a", "--gpus", "1", "--dry-run", "--json")[1])["replicas"][0]
    assert (shown["device"], shown["uuids"]) == ("gpu:1", [home.uuids[1]])
    seen = [line.split()[1] for line in home.said(2)]
    assert seen == [home.uuids[1], home.uuids[3]]


def test_a_fleet_of_another_runs_folder_is_named_as_the_holder_and_may_be_joined_by_force(home: Home) -> None:
    assert home.up("a", "--gpus", "1-2")[0] == 0
    code, _, error = home.up("b", "--gpus", "2-3", runs="others")
    assert code == 2
    assert "GPU 2 is held by p-a-gpu2 of fleet p/a; choose others (free: 0,3)" in error
    assert f"launcher stop --engine local --runs {home.folder}/runs p/a" in error
    assert not (home.folder / "others").exists()
    code, out, error = home.up("b", "--gpus", "2-3", "--force", runs="others")
    assert code == 0, error
    assert "note: GPU 2 is held by p-a-gpu2 of fleet p/a; shared as --force says" in out
    for name, gpus, runs in (("a", "1-2", "runs"), ("b", "2-3", "others")):
        code, out, error = home.up(name, "--gpus", gpus, runs=runs)
        assert code == 0, error
        assert "2 already running" in out


def test_a_dry_run_on_a_held_gpu_shows_the_plan_and_all_that_would_stop_it(home: Home) -> None:
    assert home.up("a", "--gpus", "1-2")[0] == 0
    asked = ("--gpus", "2-3", "--memory", "900g", "--dry-run")
    code, out, error = home.up("b", *asked, runs="others")
    assert (code, error) == (2, "")
    assert re.search(r"^p-b-gpu2 +GPU 2 .*900 GB", out, re.MULTILINE)
    assert re.search(r"^setsid env .*--name b", out, re.MULTILINE)
    wrong = out[out.index("would fail now") :]
    assert (
        "would fail now: --gpus 2-3: GPU 2 is held by p-a-gpu2 of fleet p/a; choose others (free: 0,3)"
        in wrong
    )
    assert "would fail now: --memory 900 GB: 2 replicas need 1800 GB" in wrong
    plan = json.loads(home.up("b", *asked, "--json", runs="others")[1])
    assert [replica["device"] for replica in plan["replicas"]] == ["gpu:2", "gpu:3"]
    assert [problem["exit_code"] for problem in plan["problems"]] == [2, 2]
    assert "GPU 2 is held by p-a-gpu2" in plan["problems"][0]["message"]
    assert not [note for note in plan["notes"] if "--force" in note]
    assert not (home.folder / "others").exists()


def test_a_dry_run_says_what_runs_already_and_what_differs(home: Home) -> None:
    assert home.up("a", "--gpus", "1-2")[0] == 0
    code, out, _ = home.up("a", "--gpus", "1-2", "--dry-run")
    assert code == 0
    assert "note: already running: p-a-gpu1, p-a-gpu2; `up` leaves them as they are" in out
    code, out, _ = home.up("a", "--gpus", "1-2", "--memory", "64m", "--dry-run")
    assert code == 2
    assert "would fail now: fleet p/a exists and differs" in out
    assert "memory" in out[out.index("differs") :]
    code, out, _ = home.up("a", "--gpus", "1-2", "--memory", "64m", "--recreate", "--dry-run")
    assert code == 0
    assert "note: --recreate: 2 replicas of this fleet would be stopped and removed first" in out


def test_free_takes_the_rest_and_keeps_it_when_repeated(home: Home) -> None:
    assert home.up("a", "--gpus", "1")[0] == 0
    assert home.up("b", "--gpus", "free:2", runs="others")[0] == 0
    assert home.devices("others") == ["gpu:0", "gpu:2"]
    code, out, _ = home.up("b", "--gpus", "free:2", runs="others")
    assert code == 0
    assert "already running: p-b-gpu0, p-b-gpu2" in out
    code, _, error = home.up("c", "--gpus", "free:2")
    assert code == 2
    assert "1 of 4 are free" in error
    assert "GPU 0 is held by p-b-gpu0 of fleet p/b" in error


def test_a_foreign_process_on_a_gpu_is_named(home: Home) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as foreign:
        home.gpus[2]["processes"] = [{"pid": foreign.pid, "memory": 11 * 2**30}]
        home.describe()
        code, _, error = home.up("a", "--gpus", "2")
        foreign.kill()
    assert code == 2
    assert f"GPU 2 is held by process {foreign.pid} of " in error
    assert "time.sleep(60), 11 GB)" in error
    assert "Traceback" not in error
    assert not (home.folder / "runs").exists()


def test_of_two_ups_at_once_on_one_gpu_one_wins_and_the_other_names_it(home: Home) -> None:
    both = [
        home.start(*up_words(name, "--gpus", "1"), runs=runs)
        for name, runs in (("a", "runs"), ("b", "others"))
    ]
    outputs = [process.communicate(timeout=60) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], outputs
    loser = 0 if both[0].returncode else 1
    assert f"GPU 1 is held by p-{'ba'[loser]}-gpu1 of fleet p/{'ba'[loser]}" in outputs[loser][1]
    assert home.devices("runs") + home.devices("others") == ["gpu:1"]


def test_what_another_up_has_started_meanwhile_is_seen_after_the_wait_for_it(home: Home) -> None:
    with host_lock() as held:  # as an `up` of fleet p/a would
        waiting = home.start(*up_words("b", "--gpus", "1"), runs="others")
        assert waiting.stdout is not None
        line = waiting.stdout.readline()
        assert line.startswith("waiting for ")
        assert f"process {os.getpid()} " in line
        engine = home.engine()
        spec = ReplicaSpec(
            name="p-a-gpu1", fleet="p/a", device=Device("gpu", "1", (home.uuids[1],)), image="", image_id="",
            command=("sleep", "60"), environment={}, runs=home.folder / "runs",
        )  # fmt: skip
        engine.start(engine.create(spec))
        held.release()
        _, error = waiting.communicate(timeout=60)
    assert waiting.returncode == 2
    assert "GPU 1 is held by p-a-gpu1 of fleet p/a" in error
    assert not (home.folder / "others").exists()


def test_of_two_equal_ups_at_once_the_second_finds_it_running(home: Home) -> None:
    both = [home.start(*up_words("a", "--gpus", "1-2")) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("already running: p-a-gpu1, p-a-gpu2" in text for text in outputs) == 1
    assert home.devices() == ["gpu:1", "gpu:2"]


def test_nobody_waits_while_another_fleet_is_watched_over(home: Home) -> None:
    watched = home.start("up", "--gpus", "1", "--settle", "60", "--", "--project", "p", "--name", "a")
    assert watched.stdout is not None
    assert any(
        line.startswith("started p-a-gpu1") for line in watched.stdout
    )  # perhaps after a wait of its own
    code, out, error = home.up("b", "--gpus", "2", runs="others")
    assert code == 0, error
    assert "p-b-gpu2" in out
    assert watched.poll() is None
    watched.terminate()
    assert "rolled back: 1 replica removed, what they wrote stays" in watched.communicate(timeout=60)[0]


def test_a_terminal_that_goes_in_the_midst_of_a_start_takes_the_fleet_back(home: Home) -> None:
    before = signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # `nohup` has it ignored, also by what is started here
    try:
        watched = home.start("up", "--gpus", "1-2", "--settle", "60", "--", "--project", "p", "--name", "a")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert watched.stdout is not None
    assert any(line.startswith("started p-a-gpu2") for line in watched.stdout)
    watched.send_signal(signal.SIGHUP)
    assert "rolled back: 2 replicas" in watched.communicate(timeout=60)[0]
    assert watched.returncode == 130
    assert home.devices() == []


def test_a_fleet_whose_start_nobody_reads_to_the_end_is_started_all_the_same(home: Home) -> None:
    begun = home.start(*up_words("a", "--gpus", "1-3"))
    assert begun.stdout is not None
    begun.stdout.close()  # as `head` does once it has its lines
    assert begun.wait(60) == 0
    assert home.devices() == ["gpu:1", "gpu:2", "gpu:3"]
    ended = home.start("kill-all", "--yes")
    assert ended.stdout is not None
    ended.stdout.close()
    assert ended.wait(60) == 0
    assert home.devices() == []


def test_one_training_on_several_gpus_is_one_replica_that_counts_from_zero(home: Home) -> None:
    code, _, error = home.up("a", "--gpus", "1-3", "--ddp", "--memory", "64m")
    assert code == 0, error
    assert home.devices() == ["gpu:1-3"]
    assert re.search(r"p-a-gpu1-3 +GPU 1-3 +running", home("status")[1])
    [line] = home.said(1)
    assert line.startswith(f"sees {','.join(home.uuids[1:])} args ")
    assert line.endswith(" --device 0,1,2")
    code, _, error = home.up("b", "--gpus", "2", runs="others")
    assert code == 2
    assert "GPU 2 is held by p-a-gpu1-3 of fleet p/a" in error
