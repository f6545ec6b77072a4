"""Whatever stands in a YAML, a study or a checkpoint, only our own errors come out, soon and in little memory."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from starling.cli import train
from starling.core.errors import StarlingError
from starling.model.checkpoint import is_own_checkpoint, load_checkpoint, save_checkpoint
from starling.model.initial_weights import read_weights
from starling.search.storage.journal import JOURNAL
from starling.search.study import SearchStudy
from tests.classic_files import ClassicFiles, trained
from tests.conftest import REPOSITORY
from tests.searches import spec

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))

HOSTILE_YAML = {
    "object tag": ("lr0: !!python/object/apply:os.system ['touch SENTINEL']", "tag"),
    "alias bomb": (BOMB, "aliases"),
    "duplicate key": ("lr0: .1\nlr0: .2", "appears twice"),
    "unknown key": ("momentun: .9", "did you mean 'momentum'"),
    "deep nest": ("a: " + "[" * 10_000, "nested"),
    "huge": ("# long\n" * 1_000_000, "larger than"),
    "huge number": ("lr0: " + "9" * 400, "lr0"),
    "endless number": ("lr0: " + "9" * 5000, "limit"),
}


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_hostile_yaml_is_exit_2_with_one_message_and_runs_nothing(
    tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    content, words = HOSTILE_YAML[kind]
    sentinel = tmp_path / "touched"
    (tmp_path / "hyp.yaml").write_text(content.replace("SENTINEL", str(sentinel)))
    assert train.main([*tiny_args, "--hyp", str(tmp_path / "hyp.yaml")]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("names", "words"), [("nc: 4\nnames: [a, b, c]", "4"), ("names: {0: a, 2: c}", "names")]
)
def test_a_dataset_whose_classes_disagree_is_exit_2(
    tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], names: str, words: str
) -> None:
    (tmp_path / "data.yaml").write_text(f"train: images\nval: images\n{names}\n")
    assert train.main([*tiny_args, "--data", str(tmp_path / "data.yaml")]) == 2
    assert words in capsys.readouterr().err


def test_hostile_yaml_is_refused_in_under_a_second_and_100_mb(tmp_path: Path) -> None:
    for number, (content, _) in enumerate(HOSTILE_YAML.values()):
        (tmp_path / f"{number}.yaml").write_text(content)
    code = """
import sys, time
from pathlib import Path
from starling.config.hyp import Hyp
from starling.config.yaml_reader import read_yaml
from starling.core.errors import UsageError
for path in map(Path, sys.argv[1:]):
    began = time.process_time()
    try:
        Hyp.from_mapping(read_yaml(path), str(path))
        sys.exit(f"{path} was taken")
    except UsageError:
        pass
    assert time.process_time() - began < 1, path
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 100 * 1024, (path, peak)
"""
    files = sorted(str(path) for path in tmp_path.glob("*.yaml"))
    done = subprocess.run(
        [sys.executable, "-c", code, *files], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# Studies


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a real study's journal: its definition and one claimed candidate."""
    folder = tmp_path_factory.mktemp("study")
    study = SearchStudy.open_or_create(folder, spec({"lr0": 0.01}, 3, signature={"data": "d"}))
    study.ask("w").lease.close()  # type: ignore[union-attr]
    return (folder / JOURNAL).read_bytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def _assert_taken_or_refused_by_name(journal: bytes, folder: Path) -> None:
    """Do what every command does with a study; only our own errors may come out."""
    (folder / JOURNAL).write_bytes(journal)
    message = str(folder)
    try:
        study = SearchStudy.read(folder)
        study.progress()
        study.finished()
    except StarlingError as error:
        message = str(error)
    assert str(folder) in message


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_record_of_a_study_is_taken_or_our_own_error(
    journal: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    records = [json.loads(line) for line in journal.splitlines()]
    record = data.draw(st.sampled_from(records))
    key = data.draw(st.sampled_from([*record, "op_code", "trial_id", "study_id"]))
    record[key] = data.draw(JSON)
    text = "\n".join(json.dumps(each) for each in records) + "\n"
    _assert_taken_or_refused_by_name(text.encode(), tmp_path_factory.mktemp("fuzz"))


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.floats(0, 1), replacement=st.binary(max_size=20), length=st.integers(0, 20))
def test_any_bytes_in_a_study_are_taken_or_our_own_error(
    journal: bytes, tmp_path_factory: pytest.TempPathFactory, place: float, replacement: bytes, length: int
) -> None:
    position = int(place * len(journal))
    _assert_taken_or_refused_by_name(
        journal[:position] + replacement + journal[position + length :], tmp_path_factory.mktemp("fuzz")
    )


def test_a_record_nested_beyond_reason_is_our_own_error(tmp_path: Path) -> None:
    _assert_taken_or_refused_by_name(b'{"op_code":' + b"[" * 200_000 + b"\n", tmp_path)


# Checkpoints


def _read(path: Path) -> None:
    for reader in (read_weights, load_checkpoint, is_own_checkpoint):
        message = path.name
        try:
            reader(path)
        except StarlingError as error:
            message = str(error)
        assert path.name in message


def _rewritten(whole: bytes, change: dict[str, bytes]) -> bytes:
    """Return the archive with some entries replaced, its sums right, as an attacker would make it."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, change.get(name.split("/", 1)[1], source.read(name)))
    return target.getvalue()


@pytest.mark.parametrize("kind", ["foreign", "ours"])
def test_a_checkpoint_with_any_bytes_changed_is_read_or_our_own_error(tmp_path: Path, kind: str) -> None:
    if kind == "ours":
        tensors = {"ema": {"w": torch.randn(50)}, "layout": {}, "names": ["a"], "rows": [[0.1] * 14]}
        save_checkpoint(tmp_path / "whole.pt", tensors)
        whole = (tmp_path / "whole.pt").read_bytes()
    else:
        whole = ClassicFiles(tmp_path).write(trained("yolov5n.yaml")).read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        pickle_name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        content = archive.read(pickle_name)
    generator = random.Random(0)
    path = tmp_path / "fuzz.pt"
    for _ in range(150 if kind == "ours" else 40):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(_rewritten(whole, {"data.pkl": bytes(damaged)}))
        _read(path)
    for _ in range(20):
        start = generator.randrange(len(whole))
        path.write_bytes(whole[:start] + os.urandom(generator.randint(0, 40)) + whole[start + 20 :])
        _read(path)
