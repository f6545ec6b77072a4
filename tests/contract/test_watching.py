"""What every engine tells of replicas at work, alike: figures, and output by time."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from launcher.devices.devices import Device
from launcher.status import output
from launcher.status.meter import Meter
from launcher.status.watch import show_status
from starling.core.units import MIB
from tests.contract.conftest import World
from tests.contract.test_engines import SLEEP, ended, run, run_to_words
from tests.waiting import wait_until

BUSY = "held = bytearray(b'x') * 40_000_000\nprint('up', flush=True)\nwhile True: pass"
COUNTS = "import time\nfor n in range(6): print('%s', n, flush=True); time.sleep(.1)"


def test_no_replicas_is_none_and_exit_code_1(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_status(world.engine, []) == 1
    assert capsys.readouterr().out == "none\n"


def test_a_busy_replica_shows_its_memory_and_about_one_core(world: World) -> None:
    busy, idle = run_to_words(world, BUSY, "a"), run_to_words(world, SLEEP, "b")
    states = world.engine.list()
    meter = Meter(world.engine)
    meter.begin(states)
    time.sleep(0.5)
    figures = meter.read(states)
    cpu = {replica_id: figures[replica_id].cpu_percent for replica_id in (busy, idle)}
    assert cpu[busy] is not None
    assert cpu[idle] is not None
    assert 0 <= cpu[idle] < cpu[busy] < 130, "how much of its core it gets is the machine's affair"
    assert 40e6 < (figures[busy].memory_bytes or 0) < 110 * MIB
    world.engine.kill(busy)
    ended(world.engine, busy)
    assert busy not in meter.read(world.engine.list())


def test_lines_carry_the_time_they_were_said(world: World) -> None:
    replica_id = run(world, COUNTS % "a")
    ended(world.engine, replica_id)
    lines = list(world.engine.logs(replica_id))
    times = [line.at for line in lines]
    assert len(lines) == 6
    assert all(at is not None and abs(at - time.time()) < 60 for at in times)
    least = 0 if world.engine.name == "podman" else 0.05  # Podman's stamps are whole seconds
    assert all(second - first >= least for first, second in pairwise(times) if first and second)


def test_since_leaves_out_what_was_said_before(world: World) -> None:
    replica_id = run(world, COUNTS % "a")
    ended(world.engine, replica_id)
    lines = list(world.engine.logs(replica_id))
    middle = lines[3].at
    assert middle is not None
    since, later = middle - 0.01, lines[3:]
    if (
        world.engine.name == "podman"
    ):  # it knows whole seconds only: all that was said within one is in it, or none
        since, later = middle, [line for line in lines if line.at is not None and line.at >= middle]
    assert list(world.engine.logs(replica_id, since=since)) == later
    assert list(world.engine.logs(replica_id, since=since, tail=1)) == lines[5:]
    assert list(world.engine.logs(replica_id, since=time.time() + 60)) == []


def test_the_output_of_several_is_merged_in_the_order_of_time(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    first = world.engine.create(world.spec(COUNTS % "one", "a"))
    second = world.engine.create(world.spec(COUNTS % "two", "b", device=Device("cpu", "1")))
    for replica_id in (first, second):
        world.engine.start(replica_id)
    for replica_id in (first, second):
        ended(world.engine, replica_id)
    output.print_logs(world.engine, [])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert all(" | " in line for line in lines)
    said = [line for replica_id in (first, second) for line in world.engine.logs(replica_id)]
    assert [line.split(" | ")[1] for line in lines] == sorted(said, key=lambda line: line.at or 0.0)
    output.print_logs(world.engine, [], tail=1)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_following_several_ends_with_the_last_and_loses_nothing(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [run(world, COUNTS % name, name) for name in ("a", "b")]
    output.print_logs(world.engine, [], follow=True)
    lines = capsys.readouterr().out.splitlines()
    for name in ("a", "b"):
        assert [line.split()[-1] for line in lines if f" {name} " in line] == list("012345")
    for replica_id in ids:
        ended(world.engine, replica_id)


def test_a_line_longer_than_any_buffer_stays_one_line(world: World) -> None:
    replica_id = run(world, "print('x' * 40_000 + 'end'); print('next')")
    ended(world.engine, replica_id)
    wait_until(lambda: len(list(world.engine.logs(replica_id))) == 2)
    assert list(world.engine.logs(replica_id)) == ["x" * 40_000 + "end", "next"]


def test_a_reader_that_leaves_ends_the_following_and_not_the_replicas(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        run(world, SLEEP, name)

    def refuse(line: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(output, "_print", refuse)
    with pytest.raises(BrokenPipeError):
        output.print_logs(world.engine, [], follow=True)
    assert [state.phase for state in world.engine.list()] == ["running"] * 2
