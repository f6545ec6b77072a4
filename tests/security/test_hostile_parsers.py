"""Whatever stands in a YAML, a pickle, a log, a cursor, a layout or a command line, only our own errors come out.

Inputs that failed once are in `hostile_pickles` and in the tables here; around them a seeded fuzz run looks for more.
"""

from __future__ import annotations

import contextlib
import json
import random
import string
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.cli.main import main as launcher_main
from starling.cli import detect, export, track, train, val
from starling.core.errors import CheckpointError, ConfigError, StarlingError
from starling.core.plain_json import NotJson, parse_json
from starling.core.plain_yaml import NotYaml, compose_yaml, load_yaml
from starling.model.checkpoint import load_checkpoint, save_checkpoint
from starling.model.detector import build_detector
from starling.model.pickle_check import PickleWalk
from starling.search.storage.journal import JOURNAL
from starling.search.study import SearchStudy
from starling.tracking.cursor import Cursor, cursor_path
from starling.tracking.delivery import Bridge
from starling.tracking.events import EventLog, last_event, read_events
from starling.tracking.run_files import export as export_run
from starling.tracking.run_files import pending
from tests.searches import spec
from tests.security.bounded import read_all
from tests.security.hostile_pickles import FILES, FORMS, HEAD, PICKLES
from tests.unit.tracking.tracking_doubles import RecordingTrackerDouble, recorded

IMPORTS = """
from starling.core.errors import StarlingError
from starling.model.checkpoint import load_checkpoint
from starling.model.initial_weights import read_weights
"""


# Pickles


def test_a_hostile_pickle_is_refused_within_20_seconds_and_a_gibibyte(tmp_path: Path) -> None:
    paths = [
        write(content, tmp_path / f"{form}, {name}.pt")
        for name, content in PICKLES.items()
        for form, write in FORMS.items()
        # The longest ones in one form only: the walk over the opcodes is the same.
        if form == "foreign" or len(content) < 1_000_000
    ]
    paths += [write(tmp_path / f"{name}.pt") for name, write in FILES.items()]
    said = read_all(paths, ["read_weights", "load_checkpoint"], imports=IMPORTS)
    assert len(said) == 2 * len(paths)
    assert not [name for name, _, words in said if words == "taken"]


BOUNDS = {
    "opcodes": (PICKLES["four million numbers"], "more than 4000000 opcodes"),
    "containers": (PICKLES["twenty million empty dicts"], "more than 1000000 lists, dicts and objects"),
    "depth": (PICKLES["a deep tuple"], "deeper than 400"),
    "weight": (PICKLES["a doubled tuple"], "unfolds beyond reason"),
    "a wide key": (b"}(" + b"K\x00" * 100 + b"tNs", "a key that is neither a text nor a number"),
    "a deep key": (b"}N" + b"\x85" * 9 + b"Ns", "a key that is neither a text nor a number"),
    "what is hashed": (
        b"(" + b"K\x00" * 1_000_000 + b"tq\x00" + b"c__builtin__\nset\n(h\x00tR" * 9,
        "hashes more than a checkpoint needs",
    ),
    "memo": (PICKLES["a huge memo index"], "memo is larger than what it holds"),
    "numbers": (PICKLES["a number of 255 bytes"], "a whole number of 255 bytes"),
    "cycles": (PICKLES["a list in itself"], "changes a value that is already part of another one"),
    "opcode": (PICKLES["POP and DUP without end"], "uses DUP"),
    "claimed text": (PICKLES["a text that claims 4 GiB"], "cut short"),
}
"""What is bounded -> a pickle that this bound alone, or this bound first, refuses, and what the message says."""


@pytest.mark.parametrize("bound", BOUNDS)
def test_each_bound_on_a_pickle_is_kept_before_anything_is_built(bound: str) -> None:
    content, words = BOUNDS[bound]
    with pytest.raises((CheckpointError, ValueError), match=words):
        PickleWalk(HEAD + content + b".", 0, {("__builtin__", "set")}).end()


def test_the_walk_takes_what_torch_saves_and_ends_where_the_pickle_does(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "ema": {f"layer.{number}.weight": torch.full((2, 3), float(number)) for number in range(2000)},
        "half": torch.ones(3, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0),
        "names": [f"class {number}" for number in range(1000)],
        "nested": {"a": [(1, 2.5, None), {"b": -(2**62)}], 3: True},
    }
    state["shared"] = state["half"]
    save_checkpoint(tmp_path / "own.pt", state)
    loaded = load_checkpoint(tmp_path / "own.pt")
    assert loaded["nested"] == state["nested"]
    assert loaded["names"] == state["names"]
    for name in ("half", "flags", "bytes", "empty"):
        assert loaded[name].dtype == state[name].dtype
        assert torch.equal(loaded[name], state[name])
    assert loaded["shared"].data_ptr() == loaded["half"].data_ptr()
    with zipfile.ZipFile(tmp_path / "own.pt") as archive:
        content = archive.read("own/data.pkl") if "own/data.pkl" in archive.namelist() else b""
        content = content or archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    known = {
        ("torch._utils", "_rebuild_tensor_v2"),
        ("collections", "OrderedDict"),
        *(("torch", f"{kind}Storage") for kind in ("Float", "BFloat16", "Bool", "Byte")),
    }
    assert PickleWalk(b"ab" + content + b"behind", 2, known).end() == 2 + len(content)


# YAML

ODD_VALUES = [
    *("!!timestamp x", "!!bool x", "!!int x", "!!float x", "!!binary x", "!!binary é", "!!omap x", "!!omap [a]"),
    *("!!pairs x", "!!pairs [a]", "!!set x", "!!set [a]", "!!merge x", "!!null x", "!!seq x", "!!map x", "!!str [a]"),
    *("!!int {}", "!!int ''", "!!float ''", "!!int 0x", "!!int 1:x", "!!value x", "!!python/tuple [a]", "!x y"),
    *("2024-13-45", "2024-02-30T25:00:00Z", "0000-00-00", "9999-99-99", "2001-01-01 00:00:00 +99:99"),
    *("1e999", "-1e999", ".nan", "9" * 5000, "9" * 30, "-" + "9" * 5000, "0x" + "f" * 100_000, "0b" + "1" * 100_000),
    *("1" + ":59" * 50_000, "0o" + "7" * 5000, "1_" * 2000 + "1", '"\\UFFFFFFFF"', '"\\ud800"', '"\\0"', '"\\x"'),
    *("[" * 10_000, "{" * 10_000, "[" * 33 + "]" * 33, "- " * 10_000 + "x", "? " * 5000, "&a [*a]", "*a", "&a &b c"),
    *("{<<: {a: 1}}", "{<<: [{a: 1}, {a: 2}]}", "{[a]: b}", "{{a: b}: c}", "{? !!set {a} : b}", "{a: 1, a: 2}"),
    *("|\n", "'", '"', "%", "@", "`", "a: b: c", "\t- x", "--- a\n--- b", "...", "\x00", "\x1b[2J", "\ufeff"),
    *("x" * 200_000, '"' + "x" * 200_000 + '"', "? " + "k" * 2000 + "\n: v", "~nosuchuser/x", "../" * 2000, "n" * 300),
    *("a\0b", "[[[[[[[[[[]]]]]]]]]]", "1e308", "-1", "true", "null", "''", "[]", "{}", "10000000000", "0", "0.5"),
]  # fmt: skip
"""Each stands as a value, in its turn, under the keys of every kind of file."""
ODD_FILES = [
    *(b"", b"\xff\xfea\x00:\x00", b"\xfe\xff\x00a", b"\xff\xfe\x00\x00a", b"a: \xff", b"\xef\xbb\xbfa: 1", b"\x00"),
    *(b"\xed\xa0\x80: 1", b"a: 1\r\rb: 2", b"!!timestamp x", b"- a", b"a", b"--- a: 1\n--- b: 2", b"? !!timestamp x\n: 1"),
    *(b"<<: &a {b: 1}", b"%YAML 9.9\n---\na: 1", b"%TAG ! " + b"x" * 10_000, b"a: &" + b"x" * 10_000, b"#" * 300_000),
    *(b"a" * 100_000, b"a:\n" * 10_000, b" " * 100_000 + b"a: 1", b"{" + b"a: 1," * 20_000, b"[a, b]: c", b"1: 2", b"~: 1"),
]  # fmt: skip


def _yaml_files(folder: Path) -> list[tuple[str, Path]]:
    """Write what is tried; return the reader's kind and the file."""
    keys = {
        "data": ("train", "val", "path", "names", "nc", "download", "unknown"),
        "hyp": ("lr0", "hsv_h", "unknown"),
        "layout": ("nc", "depth_multiple", "width_multiple", "anchors", "backbone", "head", "activation"),
        "space": ("cfg", "lr0", "imgsz", "unknown"),
        "settings": ("memory", "gpus", "train", "runs", "env", "force", "unknown"),
    }
    whole = {
        "data": {"train": "images", "val": "images", "names": "[a, b]"},
        "hyp": {},
        "layout": {
            "depth_multiple": "1.0",
            "width_multiple": "0.25",
            "anchors": "3",
            "backbone": "[[-1, 1, Conv, [16, 3, 2]]]",
            "head": "[[[0], 1, Detect, [nc, anchors]]]",
        },
        "space": {},
        "settings": {},
    }
    files, generator = [], random.Random(0)
    for kind, names in keys.items():
        for number, content in enumerate(ODD_FILES):
            files.append((kind, folder / f"{kind}-file-{number}.yaml"))
            files[-1][1].write_bytes(content)
        for name in names:
            for number, value in enumerate(ODD_VALUES):
                # Long ones once in each package: their length is the YAML reader's affair.
                if len(value) > 5000 and (kind, name) not in (("data", "train"), ("settings", "memory")):
                    continue
                if len(value) <= 5000 and name != names[0] and generator.random() > 0.5:
                    continue
                lines = {**whole[kind], name: value}
                files.append((kind, folder / f"{kind}-{name}-{number}.yaml"))
                text = "".join(f"{key}: {item}\n" for key, item in lines.items())
                files[-1][1].write_bytes(text.encode("utf-8", "surrogatepass"))
    return files


YAML_IMPORTS = """
from starling.config.hyp import Hyp
from starling.core.settings.train import TrainConfig
from starling.config.yaml_reader import read_yaml
from starling.data.dataset.dataset import DatasetDescription
from starling.core.errors import StarlingError
from starling.model.detector import build_detector
from starling.search.space_file import parse_space
import click
from launcher.cli.main import cli
from launcher.options.config_file import read_settings
from launcher.options.training_files import read_dataset
from starling.core.errors import StarlingError
from launcher.options.training_files import space_layouts
def read_any(path):
    kind = path.name.split("-")[0]
    if kind == "data":
        try:
            read_dataset(path)
        except StarlingError:
            pass
        DatasetDescription.from_yaml(path)
    elif kind == "hyp":
        Hyp.from_mapping(read_yaml(path), str(path))
    elif kind == "layout":
        build_detector(path, nc=3)
    elif kind == "space":
        space_layouts(path)
        parse_space(read_yaml(path), str(path), TrainConfig(data="x", weights="", cfg="yolov5n.yaml"), path.parent)
    else:
        read_settings(path, cli.get_command(click.Context(cli), "up"))
"""


def test_every_yaml_reader_of_both_packages_gives_one_clear_message_for_odd_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    paths = [path for _, path in _yaml_files(tmp_path)]
    said = read_all(paths, ["read_any"], imports=YAML_IMPORTS, seconds=5)
    assert len(said) == len(paths)
    refused = sum(words != "taken" for _, _, words in said)
    assert refused > len(paths) * 0.8


def test_any_bytes_are_yaml_or_not_yaml() -> None:
    generator = random.Random(0)
    seeds = [value.encode("utf-8", "surrogatepass")[:200] for value in ODD_VALUES] + [
        f[:200] for f in ODD_FILES
    ]
    marks = b"[]{}:,-?&*!|>'\"%@`#~\n \t0x1e.<"
    for _ in range(1500):
        parts = [generator.choice(seeds) for _ in range(generator.randint(1, 3))]
        content = bytearray(generator.choice([b"\n", b": ", b", "]).join(parts))
        for _ in range(generator.randint(0, 6)):
            content[generator.randrange(len(content) + 1) : 0] = bytes([generator.choice(marks)])
        for read in (load_yaml, compose_yaml):
            with contextlib.suppress(NotYaml):
                read(bytes(content))


# Layouts


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": [[-1, 1, "Conv", [65536, 7, 2]], [-1, 1, "Conv", [65536, 7, 2]]], "width_multiple": 8.0},
        {"backbone": [[-1, 100, "C3", [1024]]] * 100, "depth_multiple": 8.0},
        {"backbone": [[-1, 1, "Conv", [8, 3, 65536]]] * 3},
        {"backbone": [[-1, 100, "Conv", [8, 3, 60000]]], "depth_multiple": 8.0},
        {"backbone": [[-1, 1, "Conv", [8, 1, 1]], *([[[-1] * 100, 1, "Concat", [1]]] * 20)]},
        {"backbone": [[-1, 1, "nn.Upsample", [None, 1_000_000, "nearest"]]]},
        {"backbone": [[-1, 1, "Conv", [8, 65536, 1]]]},
        {"backbone": [[-1, 1, "SPP", [8, [5] * 50_000]]]},
        {"backbone": [[-1, 10**9, "Conv", [8]]]},
        {"backbone": [[-1, 1, "Conv", [10**9]]]},
        {"backbone": [[10**30, 1, "Conv", [8]]]},
        {"backbone": [[-5, 1, "Conv", [8]]]},
        {"depth_multiple": 10**400},
        {"width_multiple": float("inf")},
        {"anchors": 10**400},
        {"anchors": [[10**400, 1]]},
        {"anchors": [[1e308, 1e308]]},
        {"head": [[[0, 0], 1, "Detect", ["nc", "anchors"]]], "anchors": [[1, 2, 3, 4]]},
        {"backbone": [[0, 1]] * 300},
        {"backbone": "x" * 100_000},
        {"k" * 100_000: 1},
    ],
    ids=range(21),
)
def test_a_layout_that_no_memory_holds_or_that_does_not_meet_is_named_at_once(change: dict[str, Any]) -> None:
    layout = {
        "depth_multiple": 1.0,
        "width_multiple": 1.0,
        "anchors": 3,
        "backbone": [[-1, 1, "Conv", [16, 3, 2]]],
        "head": [[[-1], 1, "Detect", ["nc", "anchors"]]],
        **change,
    }
    state = torch.get_rng_state()
    with pytest.raises(ConfigError) as caught:
        build_detector(layout, nc=3)
    assert len(str(caught.value)) < 5000
    assert torch.equal(state, torch.get_rng_state())


def test_the_size_of_a_layout_is_found_without_drawing_a_number() -> None:
    torch.manual_seed(3)
    first = build_detector("yolov5n", nc=2).state_dict()["model.0.conv.weight"]
    torch.manual_seed(3)
    assert torch.equal(first, build_detector("yolov5n", nc=2).state_dict()["model.0.conv.weight"])


def test_a_head_of_too_many_classes_is_refused_before_it_is_built() -> None:
    with pytest.raises(ConfigError, match="parameters"):
        build_detector("yolov5x", nc=100_000, anchors=32)


# Event logs and cursors

ODD_JSON: list[Any] = [
    None,
    True,
    -1,
    2**70,
    1.5,
    float("inf"),
    float("nan"),
    10**30,
    "",
    "x" * 300,
    "a\0b",
    "\ud800",
    "../" * 2000,
]
ODD_JSON += [
    "n" * 2_000_000,
    [],
    {},
    [[]],
    {"a": {}},
    {"": None},
    ["x"] * 1000,
    {"a": float("inf")},
    "inf",
    "9" * 5000,
]
ODD_LINES = [
    *(b"\n", b"\0\n", b"\xff\xfe\n", b"[" * 2000 + b"]" * 2000 + b"\n", b"[" * 200_000 + b"\n", b'{"v":1\n', b"1e999\n"),
    *(b'{"v":1,"event":"metrics","seq":' + b"9" * 5000 + b"}\n", b"x" * 5_000_000 + b"\n", b'{"a":' * 70 + b"1" + b"}" * 70 + b"\n"),
    *(b'"' + b"x" * 1000 + b'"\n', b"{}\n", b"[]\n", b"null\n", b'{"event":[]}\n', b'{"event":{"a":1},"v":1}\n', b"\x1b[2J\n"),
]  # fmt: skip


def _whole_log(path: Path) -> None:
    """Write a log of every kind of event, and the files that it names."""
    (path.parent / "weights").mkdir(parents=True)
    for name in ("weights/best.pt", "a.png"):
        (path.parent / name).write_bytes(b"x")
    log = EventLog(path, "u1")
    log.append("run_start", name="exp", project="train", dir=path.parent, params={"lr0": 0.01})
    log.append("dataset", role="train", name="d", digest="1", source="s", figures={"n": 1}, classes=["a"])
    log.append("metrics", step=0, values={"loss": 1.0, "bad": float("nan")})
    log.append("picture", path="a.png", name="a", step=0)
    log.append("artifact", path="weights/best.pt", kind="weights")
    log.append("model", path="weights/best.pt", name="best", step=0, values={"map": 0.5})
    log.append("message", text="hello")
    log.append("run_end", status="finished")
    log.append("log_end")


def _deliver(log: Path, tracker: RecordingTrackerDouble) -> Cursor:
    bridge = Bridge(log, tracker)
    bridge.deliver()
    bridge.add_sample({"cpu": 1.0}, time=1000.0)
    bridge.finish(time=1000.0, gone=True)
    assert bridge.pending == 0
    return bridge.cursor


def test_whatever_stands_in_an_event_log_the_rest_is_sent_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _whole_log(tmp_path / "run" / "events.jsonl")
    lines = (tmp_path / "run" / "events.jsonl").read_bytes().splitlines(keepends=True)
    damaged = list(ODD_LINES)
    for line in lines:
        record = json.loads(line)
        damaged += [json.dumps({**record, key: odd}).encode() + b"\n" for key in record for odd in ODD_JSON]
    log = tmp_path / "run" / "events.jsonl"
    log.write_bytes(lines[0] + b"".join(damaged) + b"".join(lines[1:]))
    tracker = RecordingTrackerDouble(tmp_path / "calls.jsonl")
    cursor = _deliver(log, tracker)
    calls = [call["call"] for call in recorded(tracker.calls)]
    assert {"start", "metrics", "dataset", "picture", "artifact", "model", "console", "end"} <= set(calls)
    assert cursor.rejected > 500
    words = capsys.readouterr().err
    assert words.count("is damaged and left out") == 1
    assert last_event(log) is not None
    assert pending(log, ["double"])[0].pending == 0
    export_run(log.parent, tmp_path / "run.zip")
    assert Cursor.load(log, "double", "double").rejected == cursor.rejected, "counted once, and kept"


def test_a_log_cut_or_changed_at_any_place_is_delivered_to_its_end(tmp_path: Path) -> None:
    _whole_log(tmp_path / "run" / "events.jsonl")
    whole = (tmp_path / "run" / "events.jsonl").read_bytes()
    generator = random.Random(0)
    log = tmp_path / "run" / "events.jsonl"
    for number in range(150):
        content = bytearray(whole[: generator.randrange(len(whole))] if number % 2 else whole)
        for _ in range(generator.randint(1, 8)):
            if content:
                content[generator.randrange(len(content))] = generator.choice(b'\0{}[]",:0e9\n\xff')
        log.write_bytes(bytes(content) + b"\n")
        cursor_path(log, "double").unlink(missing_ok=True)
        _deliver(log, RecordingTrackerDouble(tmp_path / "calls.jsonl"))


def test_a_damaged_cursor_starts_anew_and_is_shown_as_an_empty_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "run" / "events.jsonl"
    _whole_log(log)
    tracker = RecordingTrackerDouble(tmp_path / "calls.jsonl")
    _deliver(log, tracker)
    path = cursor_path(log, "double")
    whole = json.loads(path.read_text())
    contents = [path.read_bytes()[:length] for length in range(0, 200, 20)] + ODD_LINES
    for odd in ODD_JSON:
        contents += [json.dumps({**whole, key: odd}).encode() for key in whole]
        run = whole["runs"]["u1"]
        contents += [json.dumps({**whole, "runs": {"u1": {**run, key: odd}}}).encode() for key in run]
        contents += [json.dumps(odd).encode()]
    for content in contents:
        path.write_bytes(content)
        assert pending(log, ["double"])[0].log == str(log)
        Cursor.look(log, "double")
        _deliver(log, tracker)
    path.write_bytes(b"[]")
    assert track.main(["status", str(tmp_path), "--runs", str(tmp_path)]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


def test_a_name_of_300_letters_and_a_loop_of_links_are_left_out(tmp_path: Path) -> None:
    log = tmp_path / "run" / "events.jsonl"
    _whole_log(log)
    (log.parent / "loop").symlink_to("loop")
    lines = log.read_bytes().splitlines(keepends=True)
    record = json.loads(lines[4])
    odd = ["n" * 300, "loop", "loop/x", "n/" * 1500, "weights", "../run/../.."]
    changed = b"".join(json.dumps({**record, "path": path}).encode() + b"\n" for path in odd)
    log.write_bytes(b"".join(lines[:4]) + changed + b"".join(lines[4:]))
    cursor = _deliver(log, RecordingTrackerDouble(tmp_path / "calls.jsonl"))
    assert cursor.rejected == len(odd)


def test_a_pipe_in_the_place_of_a_log_keeps_nobody_waiting(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "events.jsonl")
    with pytest.raises(OSError, match="regular file"):
        read_events(tmp_path / "events.jsonl")
    assert track.main(["status", str(tmp_path), "--runs", str(tmp_path)]) == 2


# Journals


def test_odd_values_and_lines_in_a_journal_are_taken_or_refused_by_name(tmp_path: Path) -> None:
    study = SearchStudy.open_or_create(tmp_path, spec({"lr0": 0.01}, 3, signature={"data": "d"}))
    study.ask("w").lease.close()  # type: ignore[union-attr]
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    changed = [[*lines[:at], odd, *lines[at:]] for odd in ODD_LINES for at in (0, len(lines))]
    for number, line in enumerate(lines):
        record = json.loads(line)
        for key in record:
            odd_records = [json.dumps({**record, key: odd}).encode() + b"\n" for odd in ODD_JSON[::4]]
            changed += [[*lines[:number], odd, *lines[number + 1 :]] for odd in odd_records]
    for content in changed:
        (tmp_path / JOURNAL).write_bytes(b"".join(content))
        with contextlib.suppress(StarlingError):
            read = SearchStudy.read(tmp_path)
            read.progress()
            read.finished()


# JSON


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 100 + "]" * 100, "9" * 5000, "9" * 30, "{", "\ud800", b"\xff", b""]
)
def test_json_without_measure_is_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(NotJson):
        parse_json(text)


# Command lines

ODD_PATHS = [
    "n" * 300,
    "a/" + "n" * 300 + "/b.yaml",
    "a\0b",
    "~nosuchuser/x",
    "x/" * 3000,
    "n,n" * 200,
    "\udcff",
    "/dev/zero",
    "/",
]
COMMANDS: dict[str, tuple[Callable[[list[str]], int], tuple[str, ...]]] = {
    "train": (train.main, ("--data", "--weights", "--hyp", "--cfg", "--project", "--name", "--resume")),
    "val": (val.main, ("--data", "--weights", "--project", "--name")),
    "detect": (detect.main, ("--source", "--weights", "--data", "--project", "--name")),
    "export": (export.main, ("--weights",)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_impossible_path_on_a_command_line_is_one_message_and_no_traceback(
    tiny_args: list[str], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    main, flags = COMMANDS[command]
    for flag in flags:
        for odd in ODD_PATHS:
            base = tiny_args if command == "train" and flag != "--resume" else []
            if flag in ("--project", "--name") and odd in ("/dev/zero", "\udcff", "/"):
                continue  # a place or a name that may be
            code = main([*base, flag, odd])
            words = capsys.readouterr().err
            assert 2 <= code <= 4, (flag, odd[:20], code, words[-300:])
            assert "Traceback" not in words


def test_an_impossible_path_on_the_launchers_command_line_is_exit_2_to_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STARLING_ENGINE", "local")
    words = {
        "--runs": lambda odd: ["status", "--runs", odd],
        "-f": lambda odd: ["up", "-f", odd, "--cpu", "1"],
        "--compose-file": lambda odd: ["track", "status", "--compose-file", odd],
        **{
            flag: lambda odd, flag=flag: ["up", "--cpu", "1", "--dry-run", "--", flag, odd]
            for flag in ("--data", "--weights", "--hyp", "--cfg", "--project", "--name", "--resume")
        },
    }
    for flag, line in words.items():
        for odd in ODD_PATHS:
            if "\0" not in odd and len(odd) < 256 and not odd.startswith("~"):
                continue
            with pytest.raises(SystemExit) as ended:
                launcher_main(line(odd))
            assert ended.value.code in (1, 2, 3, 4), (flag, odd[:20], capsys.readouterr().err)


def test_a_value_without_measure_is_shown_short() -> None:
    for value in ("x" * 100_000, ["name"] * 100_000, 10**5000, {"a": "\x1b[2J"}):
        message = str(ConfigError("names", value, "must be a list"))
        assert len(message) < 500
        assert message.isprintable()


def test_only_our_errors_come_out_of_any_letters_on_a_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    generator = random.Random(1)
    for _ in range(60):
        word = "".join(generator.choice(string.printable + "é\0~") for _ in range(generator.randint(1, 40)))
        with contextlib.suppress(StarlingError):
            assert val.main(["--data", word, "--weights", "no.pt"]) in (2, 3, 4), word
    capsys.readouterr()
