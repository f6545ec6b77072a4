"""A byte of the journal that changes is found and named, and a repair drops the record that it was in alone."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from starling.cli import search as command
from starling.config.hyp import Hyp
from starling.core.errors import CheckpointError, UsageError
from starling.search.outcome import State
from starling.search.spec import StudyPlan
from starling.search.storage.checksum import has_lost_line_end, opened, sealed
from starling.search.storage.journal import JOURNAL, LOCK, SafeJournalBackend
from starling.search.storage.repair import mend, repair
from starling.search.study import LeasedCandidate, SearchStudy, Turn
from tests.searches import outcome, spec

SEED = Hyp().as_dict()
OUTCOME = outcome(0.5)


def join(directory: Path, budget: int = 6) -> SearchStudy:
    return SearchStudy.open_or_create(
        directory, spec(SEED, budget, seed=3, plan=StudyPlan(epochs=5, prune=True), sampler="random")
    )


def finish_all(study: SearchStudy) -> None:
    while isinstance(turn := study.ask("w"), LeasedCandidate):
        value = 0.5 + turn.candidate.number / 100
        if turn.candidate.glances:
            study.report(turn, turn.candidate.glances[0], value / 2)
        study.finish(turn, replace(OUTCOME, fitness=value))
    assert turn is Turn.DONE


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """Return the folder of a small search that has ended."""
    finish_all(join(tmp_path / "search"))
    return tmp_path / "search"


def plain(path: Path) -> optuna.Study:
    """Open a journal as any tool of Optuna's does."""
    storage = JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
    return optuna.load_study(study_name="search", storage=storage)


def test_any_tool_of_optunas_opens_a_journal_with_checksums_and_may_write_to_it(search: Path) -> None:
    lines = (search / JOURNAL).read_bytes().splitlines()
    assert all(b',"crc":"' in line for line in lines)
    study = plain(search / JOURNAL)
    assert len(study.trials) == 6
    study.set_user_attr("seen", True)
    assert len(SearchStudy.read(search).finished()) == 6, "a mixture of both kinds of records"


def test_a_journal_without_checksums_opens_and_goes_on_with_them(search: Path) -> None:
    path = search / JOURNAL
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    old = [
        json.dumps({k: v for k, v in record.items() if k != "crc"}, separators=(",", ":"))
        for record in records
    ]
    path.write_text("\n".join(old) + "\n")
    assert len(SearchStudy.read(search).finished()) == 6
    finish_all(join(search, budget=7))
    assert len(plain(path).trials) == 7
    assert repair(search).copy is None


def test_every_byte_that_changes_is_found_or_harmless(search: Path) -> None:
    content = (search / JOURNAL).read_bytes()
    whole = [record for line in content.splitlines() if (record := opened(line))]
    rng = random.Random(0)
    path = search / "other.journal"
    line_ends = {position for position, byte in enumerate(content) if byte == 10}
    for position in sorted({*range(0, len(content), 41), *line_ends}):
        changed = bytearray(content)
        changed[position] ^= rng.randrange(1, 256)
        path.write_bytes(changed)
        backend = SafeJournalBackend(path)
        told, read = "", []
        try:
            read = list(backend.read_logs(0))
            backend.append_logs([])
        except CheckpointError as error:
            told = str(error)
        if told:
            number = content[:position].count(b"\n") + 1
            assert f"{path}:{number}:" in told
            assert f"starling search repair {search}" in told
        else:
            assert [strip(record) for record in read] == [strip(record) for record in whole], (
                f"byte {position}"
            )
        path.unlink()


def strip(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without its last key, the checksum, whose name may be what has changed."""
    return dict(list(record.items())[:-1])


def test_each_record_that_is_lost_is_dropped_alone_and_the_search_goes_on(search: Path) -> None:
    lines = (search / JOURNAL).read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        for damage in (line[:20] + b"\x07" + line[21:], b"\0" * (len(line) - 1) + b"\n"):
            folder = search.parent / f"{number}-{damage[0]}"
            folder.mkdir()
            (folder / JOURNAL).write_bytes(b"".join([*lines[:number], damage, *lines[number + 1 :]]))
            done = repair(folder)
            assert [dropped.line for dropped in done.dropped] == [number + 1]
            assert done.copy is not None
            assert done.copy.read_bytes().splitlines(keepends=True)[number] == damage
            assert_numbers_hold(folder, lines, number)
            assert repair(folder).copy is None


def assert_numbers_hold(folder: Path, lines: list[bytes], lost: int) -> None:
    """Assert that every trial but the one whose beginning was lost has the hyp that it had."""
    trials = plain(folder / JOURNAL).trials
    creates = [record for line in lines if (record := opened(line)) and record["op_code"] == 4]
    damaged = opened(lines[lost])
    assert len(trials) == len(creates)
    for trial, record in zip(trials, creates, strict=True):
        if record == damaged:
            assert trial.state is optuna.trial.TrialState.FAIL
            assert trial.user_attrs["root"] == trial.number
        else:
            assert trial.user_attrs["root"] == record["user_attrs"]["root"]
            assert len(trial.params) == len(record["params"])


def test_a_search_goes_on_after_a_repair_whatever_was_lost(search: Path) -> None:
    lines = (search / JOURNAL).read_bytes().splitlines(keepends=True)
    kinds = {opened(line)["op_code"]: number for number, line in enumerate(lines)}  # type: ignore[index]
    for kind, number in kinds.items():
        folder = search.parent / f"kind{kind}"
        folder.mkdir()
        (folder / JOURNAL).write_bytes(b"".join([*lines[:number], b'{"op_code":\n', *lines[number + 1 :]]))
        with pytest.raises(CheckpointError, match="repair"):
            SearchStudy.read(folder)
        repair(folder)
        study = join(folder)
        if kind == 6:
            continue  # the candidate counts as running, until its lease has been away for long
        finish_all(study)
        assert (study.progress().finished, study.progress().budget) == (6, 6)
        assert all(attempt.state is not State.RUNNING for attempt in study.attempts())


@pytest.mark.parametrize(
    "damage",
    [
        b'{"op_code":99,"worker_id":"w"}\n',
        b'{"op_code":-1}\n',
        b'{"op_code":4,"worker_id":"w","study_id":0,"datetime_start":"soon","user_attrs":{"root":3}}\n',
        b'{"op_code":0,"worker_id":"w","study_name":"search"}\n',
        b'{"op_code":2,"worker_id":"w","study_id":0}\n',
    ],
)
def test_a_record_without_a_checksum_that_cannot_be_replayed_is_dropped_too(
    search: Path, damage: bytes
) -> None:
    path = search / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:9], damage, *lines[9:]]))
    with pytest.raises(CheckpointError, match=f"repair {search}"):
        SearchStudy.read(search)
    assert [dropped.line for dropped in repair(search).dropped] == [10]
    assert len(SearchStudy.read(search).finished()) == 6
    finish_all(study := join(search))
    assert (study.progress().finished, study.progress().budget) == (6, 6)


def test_a_block_of_zeros_over_several_records_keeps_the_numbering(search: Path) -> None:
    content = (search / JOURNAL).read_bytes()
    begin, end = content.index(b'"root":1'), content.index(b'"root":3')
    damaged = content[:begin] + b"\0" * (end - begin) + content[end:]
    lines = damaged.splitlines(keepends=True)
    kept, dropped = mend(lines)
    trials = [record for line in kept if (record := opened(line)) and record["op_code"] == 4]
    assert [trial["user_attrs"]["root"] for trial in trials] == list(range(6))
    assert dropped[0].candidates == (1, 2, 3)


def test_the_command_names_file_line_and_candidate(search: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = search / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if b'"root":2' in line)
    path.write_bytes(b"".join([*lines[:number], lines[number].replace(b"0", b"1", 1), *lines[number + 1 :]]))
    assert command.main(["show", str(search)]) == 4
    assert f"{path}:{number + 1}: not a record of a study, or a damaged one" in capsys.readouterr().err
    assert command.main(["repair", str(search)]) == 0
    out = capsys.readouterr().out
    assert f"{path}:{number + 1}: dropped (candidate 2)" in out
    assert "study.journal.damaged1" in out
    assert command.main(["show", str(search)]) == 0
    assert "1 failed" in capsys.readouterr().out
    assert command.main(["repair", str(search), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == []
    assert command.main(["repair", str(search.parent)]) == 2


def test_a_worker_that_has_read_the_damaged_file_is_told_of_the_repair(search: Path) -> None:
    study = join(search, budget=9)
    path = search / JOURNAL
    content = path.read_bytes()
    path.write_bytes(content[:50] + b"\x00" + content[51:])  # in place: the same file
    repair(search)
    with pytest.raises(CheckpointError, match="repaired or replaced"):
        study.ask("w")


def test_a_repair_waits_for_a_worker_that_holds_the_study(search: Path) -> None:
    study = join(search)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (repair(search), done.set()))
    with study._storage.lock():
        thread.start()
        assert not done.wait(0.2)
    assert done.wait(10)
    thread.join()


def test_what_is_no_journal_is_not_repaired(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("dear diary\n")
    with pytest.raises(UsageError, match="no study's journal"):
        repair(tmp_path)
    assert os.listdir(tmp_path) == [JOURNAL] or LOCK in os.listdir(tmp_path)
    assert (tmp_path / JOURNAL).read_text() == "dear diary\n"


def test_a_torn_record_is_cut_and_a_whole_one_whose_line_end_changed_is_named(tmp_path: Path) -> None:
    record = {"op_code": 1, "worker_id": "w"}
    path = tmp_path / "j"
    for tail, is_damage in (
        (sealed(record)[:-1], False),
        (sealed(record)[:-4], False),
        (sealed(record)[:-1] + b"J", True),
    ):
        path.write_bytes(sealed(record) + tail)
        backend = SafeJournalBackend(path)
        if is_damage:
            with pytest.raises(CheckpointError, match=r"j:2: not a record of a study"):
                backend.append_logs([record])
            assert path.read_bytes() == sealed(record) + tail
        else:
            backend.append_logs([record])
            assert path.read_bytes() == sealed(record) * 2


def test_a_tail_of_many_false_checksums_is_summed_once() -> None:
    tail = b"x" + b',"crc":"00000000"}' * 100_000
    began = time.process_time()
    assert not has_lost_line_end(tail)
    assert time.process_time() - began < 2


UNREPLAYABLE_RECORDS = {
    "a parameter of a trial of this study": b'{"op_code":5,"worker_id":"w","trial_id":0,"param_name":"lr0",'
    b'"param_value_internal":1,"distribution":"{}"}\n',
    "a distribution that nobody can parse": b'{"op_code":4,"worker_id":"w","study_id":0,"datetime_start":null,'
    b'"distributions":{"lr0":"soon"},"params":{}}\n',
    "a distribution of a thousand levels": b'{"op_code":4,"worker_id":"w","study_id":0,"datetime_start":null,'
    b'"distributions":{"lr0":"' + b"[" * 5000 + b'"},"params":{}}\n',
    "a state that there is none of": b'{"op_code":6,"worker_id":"w","trial_id":0,"state":9,"values":null}\n',
    "a parameter of no trial": b'{"op_code":5,"worker_id":"w","param_name":"lr0"}\n',
    "a kind that there is none of": b'{"op_code":77,"worker_id":"w"}\n',
}


@pytest.mark.parametrize("record", UNREPLAYABLE_RECORDS.values(), ids=UNREPLAYABLE_RECORDS)
def test_a_record_that_arrives_while_a_worker_runs_is_told_as_at_opening(
    tmp_path: Path, record: bytes
) -> None:
    study = join(tmp_path / "s", budget=3)
    claim = study.ask("w")
    assert isinstance(claim, LeasedCandidate)
    path = tmp_path / "s" / JOURNAL
    line = path.read_bytes().count(b"\n") + 1
    with path.open("ab") as file:
        file.write(record)
    told = set()
    for use in (
        lambda: study.ask("w"),
        lambda: study.report(claim, 1, 0.5),
        lambda: study.finish(claim, OUTCOME),
        lambda: study.fail(claim, State.LOST, "gone"),
        lambda: study.describe({"images": 3}),
        lambda: study.add_known(lambda trials: []),
        study.finished,
        study.attempts,
        study.imported,
        study.progress,
        lambda: study.budget,
        lambda: study.training,
        lambda: join(tmp_path / "s", budget=3),
        lambda: SearchStudy.read(tmp_path / "s"),
    ):
        with pytest.raises(CheckpointError) as caught:
            use()
        told.add(str(caught.value))
    claim.lease.close()
    assert len(told) == 1
    assert f"{path}:{line}: " in told.pop()
    assert f"starling search repair {tmp_path / 's'}" in str(caught.value)
    repair(tmp_path / "s")
    assert SearchStudy.read(tmp_path / "s").progress().running == 1


def trial_record(**attributes: Any) -> dict[str, Any]:
    """Return the record of a trial that some tool of Optuna's writes and that has these attributes."""
    return {
        "op_code": 4, "worker_id": "w", "study_id": 0, "datetime_start": "2026-01-01T00:00:00.000000", "state": 3,
        "datetime_complete": "2026-01-01T00:00:00.000000", "values": None, "distributions": {}, "params": {},
        "user_attrs": {"worker": "w", "root": 0, **attributes}, "system_attrs": {}, "intermediate_values": {},
    }  # fmt: skip


STRANGE_FACTS = {
    "a budget in words": {"op_code": 2, "worker_id": "w", "study_id": 0, "user_attr": {"budget": "many"}},
    "a training in words": {"op_code": 2, "worker_id": "w", "study_id": 0, "user_attr": {"training": "long"}},
    "an attempt that continues itself": trial_record(ending="stopped", retry_of=0),
    "an attempt that continues a later one": trial_record(ending="stopped", retry_of=5),
    "an attempt lost so often": trial_record(ending="stopped", lost_before="often"),
    "a retry of a list": trial_record(ending="stopped", retry_of=[1]),
    "a finalist of words": trial_record(finalist_of="best", fresh_seed=0),
}


@pytest.mark.parametrize("record", STRANGE_FACTS.values(), ids=STRANGE_FACTS)
@pytest.mark.parametrize("meanwhile", [False, True], ids=["at opening", "meanwhile"])
def test_a_record_whose_values_are_no_search_s_never_ends_in_a_traceback(
    tmp_path: Path, record: dict[str, Any], *, meanwhile: bool
) -> None:
    study = join(tmp_path / "s", budget=3)
    with (tmp_path / "s" / JOURNAL).open("ab") as file:
        file.write(sealed(record))
    told = []
    for use in ("ask", "progress", "training", "attempts", "finished", "correlations"):
        try:
            seen = study if meanwhile else join(tmp_path / "s", budget=3)
            fact = getattr(seen, use)
            if callable(fact):
                fact(*(["w"] if use == "ask" else []))
        except CheckpointError as error:
            told.append(str(error))
    assert told
    assert all(f"{tmp_path / 's' / JOURNAL}: holds a record" in words for words in told)
