"""What every engine does alike. Anything that launches replicas some other way has to pass this too."""

from __future__ import annotations

import os
import pty
import signal
import threading
import time
from dataclasses import replace

import pytest

from launcher.devices.devices import Device
from launcher.engines.base import Engine, ReplicaState
from launcher.errors import EngineError, NameTaken, ReplicaFailed
from launcher.fleet.end import stop
from launcher.status.words import words_for
from starling.core.errors import StarlingError, UsageError
from tests.contract.conftest import World, bring_up
from tests.waiting import wait_until

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
HOG = "x = bytearray()\nwhile True: x += b'x' * 5_000_000"
SAVES = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
    "print('up', flush=True)\ntime.sleep(60)"
)
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def run(world: World, code: str, replica: str = "a") -> str:
    replica_id = world.engine.create(world.spec(code, replica))
    world.engine.start(replica_id)
    return replica_id


def run_to_words(world: World, code: str, replica: str = "a") -> str:
    """Start a replica and return once it has said `up`, so that its handlers are in place."""
    replica_id = run(world, code, replica)
    wait_until(lambda: "up" in world.engine.logs(replica_id))
    return replica_id


def ended(engine: Engine, replica_id: str) -> ReplicaState:
    wait_until(lambda: (state := engine.state(replica_id)) is not None and state.phase == "exited")
    state = engine.state(replica_id)
    assert state is not None
    return state


def test_a_created_replica_is_listed_and_does_not_run(world: World) -> None:
    spec = world.spec(SLEEP)
    replica_id = world.engine.create(spec)
    [state] = world.reopen().list()
    assert (state.id, state.name, state.fleet, state.phase) == (replica_id, spec.name, spec.fleet, "created")
    assert state.plan == spec.public()


def test_another_command_sees_a_started_replica_run(world: World) -> None:
    replica_id = run(world, SLEEP)
    state = world.reopen().state(replica_id)
    assert state is not None
    assert state.phase == "running"
    assert state.live
    assert state.started_at is not None
    assert abs(state.started_at - time.time()) < 60


@pytest.mark.parametrize("code", [0, 3])
def test_exit_codes_are_kept(world: World, code: int) -> None:
    state = ended(world.engine, run(world, f"raise SystemExit({code})"))
    assert state.exit_code == code
    assert state.finished == (code == 0)
    assert not state.oom_killed


def test_a_name_belongs_to_its_first_creator(world: World) -> None:
    first = world.engine.create(world.spec(SLEEP))
    with pytest.raises(NameTaken, match=world.spec(SLEEP).name):
        world.engine.create(world.spec(SLEEP))
    assert [state.id for state in world.engine.list()] == [first]


def test_sigterm_reaches_the_trainer_which_saves_and_ends_143(world: World) -> None:
    replica_id = run_to_words(world, SAVES)
    world.engine.terminate(replica_id)
    assert ended(world.engine, replica_id).exit_code == 143
    assert "saved" in list(world.engine.logs(replica_id))


def test_a_killed_replica_is_not_called_out_of_memory(world: World) -> None:
    replica_id = run_to_words(world, SLEEP)
    world.engine.kill(replica_id)
    state = ended(world.engine, replica_id)
    assert state.exit_code == 137
    assert not state.oom_killed


def test_a_replica_that_exceeds_its_memory_is_ended_and_spares_its_sibling(world: World) -> None:
    sibling = run_to_words(world, SLEEP, "b")
    state = ended(world.engine, run(world, HOG))
    assert state.exit_code == 137
    assert not state.finished
    assert state.oom_killed == world.tells_oom
    if world.tells_oom:
        assert words_for(state) == "OOM-KILLED at 128 MB"
    survivor = world.engine.state(sibling)
    assert survivor is not None
    assert survivor.phase == "running"


def test_a_child_that_is_out_of_memory_is_told_beside_the_exit_code(world: World) -> None:
    code = f"import subprocess, sys; print(subprocess.run([sys.executable, '-c', {HOG!r}]).returncode)"
    state = ended(world.engine, run(world, code))
    assert state.exit_code == 0
    assert list(world.engine.logs(state.id)) == ["-9"]
    assert state.oom_killed == world.tells_oom


def test_stop_kills_what_outlasts_the_grace_and_spares_nobody_the_wait(world: World, said: list[str]) -> None:
    run_to_words(world, STUBBORN, "a")
    run_to_words(world, SAVES, "b")
    states = stop(world.engine, world.engine.list(), grace_s=1.5)
    assert {state.exit_code for state in states} == {137, 143}
    assert any("still running after 1.5 s" in line for line in said)


def test_the_end_of_what_does_not_run_is_no_error(world: World) -> None:
    created = world.engine.create(world.spec(SLEEP, "a"))
    over = ended(world.engine, run(world, "", "b")).id
    for replica_id in (created, over):
        world.engine.terminate(replica_id)
        world.engine.kill(replica_id)
    assert [state.phase for state in world.engine.list()] == ["created", "exited"]


def test_a_removed_replica_leaves_nothing_and_may_be_removed_again(world: World) -> None:
    replica_id = run_to_words(world, STUBBORN)
    began = time.monotonic()
    world.engine.remove(replica_id)
    assert time.monotonic() - began < 8, "removing asks nobody"
    assert world.engine.list() == []
    assert world.engine.state(replica_id) is None
    assert list(world.runs.iterdir()) == []
    for act in (world.engine.remove, world.engine.terminate, world.engine.kill):
        act(replica_id)


def test_logs_of_a_dead_replica_are_whole_lines_and_return(world: World) -> None:
    replica_id = run(world, "print('one'); print('two, ü'); print('three', end='')")
    ended(world.engine, replica_id)
    assert list(world.engine.logs(replica_id)) == ["one", "two, ü", "three"]
    assert list(world.engine.logs(replica_id, follow=True)) == ["one", "two, ü", "three"]
    assert list(world.engine.logs(replica_id, tail=1)) == ["three"]


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_what_a_replica_has_started_ends_with_it(world: World, how: str) -> None:
    """Also a process that has left its session."""
    file = f"{'/runs' if world.engine.name != 'local' else world.runs}/alive"
    stray = f"import time\nwhile True: open({file!r}, 'a').write('x'); time.sleep(.02)"
    code = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {stray!r}], start_new_session=True, stdout=-3)\n"
        f"while not os.path.exists({file!r}): time.sleep(.02)\n"
        f"print('up', flush=True); time.sleep({0 if how == 'exit' else 60})"
    )
    replica_id = run_to_words(world, code)
    if how == "kill":
        world.engine.kill(replica_id)
    ended(world.engine, replica_id)
    size = (world.runs / "alive").stat().st_size
    time.sleep(0.2)
    assert (world.runs / "alive").stat().st_size == size


def test_following_ends_with_the_replica_and_misses_nothing(world: World) -> None:
    code = "import time\nfor n in range(5): print(n, flush=True); time.sleep(.2)"
    replica_id = run(world, code)
    assert list(world.engine.logs(replica_id, follow=True)) == ["0", "1", "2", "3", "4"]


def test_a_watcher_that_leaves_does_not_disturb_the_replica(world: World) -> None:
    replica_id = run_to_words(world, SLEEP)
    watching = world.reopen().logs(replica_id, follow=True)
    assert next(watching) == "up"
    watching.close()  # type: ignore[attr-defined]
    state = world.engine.state(replica_id)
    assert state is not None
    assert state.phase == "running"


def test_environment_is_what_was_given_and_never_in_the_plan(world: World) -> None:
    spec = replace(world.spec(SLEEP), passed={"TRACKER_KEY": "s3cret"})
    replica_id = world.engine.create(spec)
    world.engine.start(replica_id)
    wait_until(lambda: "up" in world.engine.logs(replica_id))
    environment = world.engine.environment(replica_id)
    if world.engine.name == "docker":
        assert environment is not None
        assert environment["TRACKER_KEY"] == "s3cret"
    state = world.engine.state(replica_id)
    assert state is not None
    assert "s3cret" not in str(state.plan)
    assert "s3cret" not in repr(spec)


def test_a_replica_runs_on_its_own_cores(world: World) -> None:
    replica_id = run(world, "import os; print(sorted(os.sched_getaffinity(0)))")
    ended(world.engine, replica_id)
    assert list(world.engine.logs(replica_id)) == ["[0]"]


def test_up_twice_changes_nothing(world: World) -> None:
    specs = [world.spec(SLEEP, "a"), world.spec(SLEEP, "b", device=Device("cpu", "1"))]
    assert len(bring_up(world.engine, specs).start) == 2
    before = world.engine.list()
    again = bring_up(world.reopen(), specs, settle_s=0)
    assert again.start == ()
    assert len(again.running) == 2
    assert world.engine.list() == before


def test_a_changed_up_shows_the_difference_and_changes_nothing_unless_told(world: World) -> None:
    bring_up(world.engine, [world.spec(SAVES)], settle_s=0.5)
    before = world.engine.list()
    changed = [world.spec(SLEEP, memory_bytes=256 * 1024**2)]
    with pytest.raises(UsageError, match=r"memory: 128 MB -> 256 MB(.|\n)*--recreate"):
        bring_up(world.engine, changed, settle_s=0)
    assert world.engine.list() == before
    assert bring_up(world.engine, changed, recreate=True, settle_s=0).start == (changed[0],)
    [state] = world.engine.list()
    assert state.plan == changed[0].public()


def test_up_resumes_the_dead_and_leaves_the_living(world: World) -> None:
    specs = [world.spec(SLEEP, "a"), world.spec(SLEEP, "b", device=Device("cpu", "1"))]
    bring_up(world.engine, specs, settle_s=0)
    living, dead = world.engine.list()
    world.engine.kill(dead.id)
    ended(world.engine, dead.id)
    changes = bring_up(world.engine, specs, settle_s=0)
    assert (changes.running, [spec.name for spec in changes.start]) == ((living.name,), [dead.name])
    assert {state.phase for state in world.engine.list()} == {"running"}


def test_a_replica_that_fails_at_the_start_takes_the_whole_fleet_back(world: World) -> None:
    specs = [world.spec(SLEEP, "a"), world.spec("print('no such dataset'); raise SystemExit(3)", "b")]
    with pytest.raises(ReplicaFailed, match=r"data error(.|\n)*no such dataset") as caught:
        bring_up(world.engine, specs, settle_s=10)
    assert caught.value.exit_code == 3
    assert world.engine.list() == []


def test_a_third_start_that_fails_takes_back_the_created_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = world.engine.start, []

    def fail_third(replica_id: str) -> None:
        started.append(replica_id)
        if len(started) == 3:
            raise EngineError("no device")
        start(replica_id)

    monkeypatch.setattr(world.engine, "start", fail_third)
    specs = [world.spec(SLEEP, name) for name in "abcd"]
    with pytest.raises(EngineError, match="no device"):
        bring_up(world.engine, specs, settle_s=0)
    assert world.reopen().list() == []


def test_an_interrupt_inside_a_creation_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    create = world.engine.create

    def interrupted(spec: object) -> str:
        create(spec)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(world.engine, "create", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bring_up(world.engine, [world.spec(SLEEP)], settle_s=0)
    assert world.reopen().list() == []


def test_two_creators_at_once_make_one_replica(world: World) -> None:
    results: list[str] = []

    def create(engine: Engine) -> None:
        try:
            results.append(engine.create(world.spec(SLEEP)))
        except NameTaken:
            results.append("taken")

    threads = [threading.Thread(target=create, args=(world.reopen(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("taken") == 1
    assert len(world.engine.list()) == 1


def test_replicas_of_another_owner_are_out_of_sight(world: World) -> None:
    replica_id = run(world, SLEEP)
    stranger = world.reopen()
    stranger._owner = 1 + stranger._owner  # type: ignore[attr-defined]
    assert stranger.list() == []
    assert stranger.state(replica_id) is None


def test_a_fleet_of_another_user_is_named_with_its_user_before_anything_is_created(world: World) -> None:
    specs = [world.spec(SLEEP, "a"), world.spec(SLEEP, "b")]
    stranger = world.reopen()
    stranger._owner = 65534  # type: ignore[attr-defined]
    try:
        bring_up(stranger, specs[1:], settle_s=0)
        theirs = stranger.list()
        with pytest.raises(NameTaken) as caught:
            bring_up(world.engine, specs, settle_s=0)
        assert str(caught.value) == (
            f"fleet {world.fleet} is in use by user nobody (uid 65534), whose replica {specs[1].name} stays unchanged: "
            "give the training another --name"
        )
        assert caught.value.exit_code == 5
        assert world.engine.list() == []
        assert stranger.list() == theirs
        assert theirs[0].phase == "running"
    finally:
        for state in stranger.list():
            stranger.remove(state.id)


def test_a_replica_removed_by_somebody_else_before_its_start_takes_the_fleet_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = world.engine.start

    def removed_first(replica_id: str) -> None:
        world.reopen().remove(replica_id)
        start(replica_id)

    monkeypatch.setattr(world.engine, "start", removed_first)
    with pytest.raises(StarlingError) as caught:
        bring_up(world.engine, [world.spec(SLEEP, "a"), world.spec(SLEEP, "b")], settle_s=0)
    assert caught.value.exit_code == 5
    assert world.reopen().list() == []


def test_a_replica_removed_by_somebody_else_is_no_error_to_who_looks_or_stops(world: World) -> None:
    ids = [run_to_words(world, STUBBORN, name) for name in "ab"]
    states = world.engine.list()
    looking: list[list[str]] = []
    remover = threading.Thread(target=lambda: [world.reopen().remove(replica_id) for replica_id in ids])
    remover.start()
    while remover.is_alive():
        looking.append([state.name for state in world.engine.list()])
    began = time.monotonic()
    assert stop(world.engine, states, grace_s=30) == []
    assert time.monotonic() - began < 20
    assert looking
    assert all(set(names) <= {state.name for state in states} for names in looking)


def test_a_replica_that_vanishes_while_the_start_is_watched_is_told(world: World) -> None:
    def remove_soon() -> None:
        wait_until(lambda: any(state.live for state in world.engine.list()))
        [state] = world.reopen().list()
        world.reopen().remove(state.id)

    remover = threading.Thread(target=remove_soon)
    remover.start()
    # Whoever removes a replica kills it first, and may be seen between the two.
    with pytest.raises(
        StarlingError, match=r"disappeared during its start; another command removed it|killed \(137\)"
    ):
        bring_up(world.reopen(), [world.spec(SLEEP)], settle_s=20)
    remover.join()
    assert world.engine.list() == []


def test_a_replica_survives_the_death_of_its_launcher(world: World) -> None:
    """A child process brings the replica up and is killed: the replica is nobody's child."""
    pid = os.fork()
    if pid == 0:
        run_to_words(replace(world, engine=world.reopen()), SLEEP)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    [state] = world.engine.list()
    assert state.phase == "running"


def test_a_replica_survives_the_terminal_of_its_launcher_and_is_found_again(world: World) -> None:
    """The terminal is a real one: its closing hangs up on everybody in the launcher's session."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may ignore it (nohup)
        run_to_words(replace(world, engine=world.reopen()), SAVES)
        os.write(1, b"started\n")
        time.sleep(60)
        os._exit(0)
    said = b""
    while b"started" not in said:
        said += os.read(terminal, 1024)
    os.close(terminal)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGHUP
    [state] = world.reopen().list()
    assert state.phase == "running"
    world.engine.terminate(state.id)
    assert ended(world.engine, state.id).exit_code == 143


def test_a_file_is_read_as_a_replica_sees_it_and_only_a_plain_one(world: World) -> None:
    """Also after its end; a link, a folder, a pipe and a file over the limit read as nothing."""
    names = ("plain", "link", "folder", "pipe", "huge", "none")
    code = (
        "import os; os.chdir({place!r}); open('plain', 'w').write('hello'); os.symlink('plain', 'link');"
        "os.mkdir('folder'); os.mkfifo('pipe'); open('huge', 'w').write('x' * 5000)"
    )
    place = str(world.runs) if world.engine.name == "local" else "/runs"
    replica_id = world.engine.create(world.spec(code.format(place=place)))
    world.engine.start(replica_id)
    ended(world.engine, replica_id)
    texts = {name: world.engine.read_file(replica_id, f"{place}/{name}", 1000) for name in names}
    # Podman follows a link, within the container and without a word.
    link = b"hello" if world.engine.name == "podman" else b""
    assert texts == {**dict.fromkeys(names, b""), "plain": b"hello", "link": link}
    world.engine.remove(replica_id)
    assert world.engine.read_file(replica_id, f"{place}/plain", 1000) == b""
