"""Foreign checkpoints are read as data; whatever else they hold is refused and never runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from starling.core.errors import CheckpointError
from starling.model import inert_pickle
from starling.model.detector import build_detector
from starling.model.foreign import read_foreign_checkpoint
from starling.model.inert_pickle import GLOBALS, read_pickle
from starling.model.layout import read_layout
from starling.model.weights import load_weights
from tests.classic_files import ClassicFiles, trained
from tests.conftest import TINY_LAYOUT

CELLS = ("RBC", "WBC", "Platelets")


def archive(path: Path, content: bytes, entries: dict[str, bytes] | None = None) -> Path:
    """Write a checkpoint in zip form around a pickle made by hand."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("weights/data.pkl", content)
        for name, data in (entries or {}).items():
            file.writestr(f"weights/{name}", data)
    return path


@pytest.fixture
def files(tmp_path: Path) -> ClassicFiles:
    return ClassicFiles(tmp_path)


@pytest.fixture
def classic(files: ClassicFiles) -> Path:
    """Return a file of the smallest shipped layout, as the classic trainer leaves it at the end of a training."""
    return files.write(trained("yolov5n.yaml", names=CELLS))


def test_a_classic_file_fits_the_shipped_layout_exactly(classic: Path) -> None:
    checkpoint = read_foreign_checkpoint(classic)
    detector = build_detector("yolov5n.yaml", nc=3)
    ours = [(name, t.shape) for name, t in detector.state_dict().items()]
    assert [(name, t.shape) for name, t in checkpoint.state_dict.items()] == ours
    floats = [t for t in checkpoint.state_dict.values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float32}
    assert checkpoint.names == CELLS
    assert checkpoint.nc == 3
    assert checkpoint.strides == (8.0, 16.0, 32.0)
    assert checkpoint.anchors is not None
    assert (checkpoint.anchors[0] * 8).tolist() == [[10, 13], [16, 30], [33, 23]]
    assert not load_weights(detector, checkpoint.state_dict).left_out


def test_a_classic_file_also_builds_by_its_own_layout(classic: Path) -> None:
    checkpoint = read_foreign_checkpoint(classic)
    assert checkpoint.layout is not None
    detector = build_detector(checkpoint.layout, nc=checkpoint.nc)
    assert not load_weights(detector, checkpoint.state_dict).left_out


def test_reading_imports_none_of_the_modules_that_the_file_names(classic: Path) -> None:
    read_foreign_checkpoint(classic)
    assert not any(name == "models" or name.startswith("models.") for name in sys.modules)


@pytest.mark.parametrize("half", [True, False])
def test_values_survive_and_half_precision_becomes_float32(files: ClassicFiles, half: bool) -> None:
    source = trained(TINY_LAYOUT, names=("a", "b", "c"))
    checkpoint = read_foreign_checkpoint(files.write(source, half=half, stripped=False))
    assert all(torch.equal(checkpoint.state_dict[key], value) for key, value in source.state_dict().items())
    assert checkpoint.state_dict["model.0.conv.weight"].dtype == torch.float32
    assert checkpoint.state_dict["model.0.bn.num_batches_tracked"].dtype == torch.int64
    assert checkpoint.names == ("a", "b", "c")
    assert checkpoint.epoch == 12


def test_the_ema_is_preferred(files: ClassicFiles) -> None:
    source = trained(TINY_LAYOUT)
    weights = source.state_dict()["model.0.conv.weight"]
    for average in ("module", "pair"):
        path = files.write(source, average=average)  # whose model itself is all zeros
        assert torch.equal(read_foreign_checkpoint(path).state_dict["model.0.conv.weight"], weights), average


@pytest.mark.parametrize("activation", ["nn.LeakyReLU(0.1)", "nn.Hardswish()", None])
def test_an_older_activation_reaches_the_layout(files: ClassicFiles, activation: str | None) -> None:
    older = {} if activation is None else {"activation": activation}
    path = files.write(trained({**read_layout(TINY_LAYOUT), **older}))
    layout = read_foreign_checkpoint(path).layout
    assert layout is not None
    assert layout.get("activation") == activation


def test_settings_and_scores_beside_the_model_are_ignored(files: ClassicFiles) -> None:
    beside = {
        "best_fitness": np.array([0.5]),
        "opt": {"save_dir": Path("runs/train/exp")},
        "score": np.float64(0.5),
    }
    path = files.write(trained(TINY_LAYOUT, names=CELLS), beside=beside)
    assert read_foreign_checkpoint(path).names == CELLS


def test_a_plain_state_dict_is_read(tmp_path: Path) -> None:
    detector = build_detector("yolov5n", nc=1)
    torch.save(detector.state_dict(), tmp_path / "plain.pt")
    checkpoint = read_foreign_checkpoint(tmp_path / "plain.pt")
    assert list(checkpoint.state_dict) == list(detector.state_dict())
    assert checkpoint.layout is None


class _Runs:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _touching(sentinel: Path) -> dict[str, bytes]:
    """Return pickles that create `sentinel` when a common unpickler reads them."""
    code = f"open({str(sentinel)!r}, 'w').close()"
    command = f"touch {sentinel}"
    calls = {
        "system": _Runs(os.system, command),
        "exec": _Runs(exec, code),
        "eval": _Runs(eval, code),
        "import": _Runs(__import__, "os"),
    }
    attacks = {
        f"{name} in protocol {protocol}": pickle.dumps({"model": call}, protocol)
        for name, call in calls.items()
        for protocol in (0, 2, 4)
    }
    text = command.encode()
    attacks["INST"] = b"(S'" + text + b"'\nios\nsystem\n."
    attacks["OBJ"] = b"(cos\nsystem\nU" + bytes([len(text)]) + text + b"o."
    attacks["a global after an allowed one"] = (
        b"\x80\x02cmodels.yolo\nDetectionModel\n0cos\nsystem\nX"
        + struct.pack("<I", len(text))
        + text
        + b"\x85R."
    )
    return attacks


def test_a_malicious_pickle_never_runs(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    attacks = _touching(sentinel)
    # The attack itself works: the sentinel would show it.
    pickle.loads(attacks["system in protocol 2"])  # noqa: S301
    assert sentinel.exists()
    sentinel.unlink()
    for name, attack in attacks.items():
        with pytest.raises(CheckpointError):
            read_foreign_checkpoint(archive(tmp_path / "evil.pt", attack))
        assert not sentinel.exists(), name


def test_a_refused_global_is_named(tmp_path: Path) -> None:
    content = pickle.dumps(_Runs(os.system, "true"), 2)
    with pytest.raises(CheckpointError, match=r"evil\.pt: the pickle names (posix|os)\.system"):
        read_foreign_checkpoint(archive(tmp_path / "evil.pt", content))


def test_each_of_the_two_passes_refuses_a_global_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    content = pickle.dumps(_Runs(os.getpid), 2)
    named = r"the pickle names posix\.getpid"
    with pytest.raises(CheckpointError, match=named):
        inert_pickle._check_opcodes(content, 0)
    monkeypatch.setattr(inert_pickle, "_check_opcodes", lambda content, *_: len(content))
    with pytest.raises(CheckpointError, match=named):
        read_pickle(content)


@pytest.mark.parametrize(
    ("opcode", "content"),
    [
        ("INST", b"(ios\nsystem\n."),
        ("STACK_GLOBAL", b"\x80\x04X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93."),
        ("EXT1", b"\x80\x02\x82\x01."),
        ("PERSID", b"P0\n."),
        ("OBJ", b"(cmodels.yolo\nModel\no."),
    ],
)
def test_an_opcode_that_such_files_do_not_need_is_refused_by_name(opcode: str, content: bytes) -> None:
    with pytest.raises(CheckpointError, match=f"the pickle uses {opcode}, "):
        read_pickle(content)


def test_the_table_holds_nothing_that_acts() -> None:
    for (module, name), stand_in in GLOBALS.items():
        origin = stand_in.__module__ if isinstance(stand_in, type) else type(stand_in).__module__
        assert origin == "starling.model.inert_pickle" or stand_in is set, (module, name)


def test_a_file_cannot_change_what_stands_for_a_global(tmp_path: Path) -> None:
    before = dict(vars(GLOBALS["models.yolo", "Model"]))
    for name in (
        "cmodels.yolo\nModel\n",
        "ctorch._utils\n_rebuild_tensor_v2\n",
        "ccollections\nOrderedDict\n",
    ):
        attack = b"\x80\x02" + name.encode() + b"}X\x04\x00\x00\x00kindX\x04\x00\x00\x00evilsb."
        with pytest.raises(CheckpointError):
            read_foreign_checkpoint(archive(tmp_path / "evil.pt", attack))
    assert dict(vars(GLOBALS["models.yolo", "Model"])) == before


class _Referring(pickle.Pickler):
    """Writes tensors as torch does, with sizes of the caller's choice."""

    def persistent_id(self, obj: Any) -> Any:
        return obj.ids if isinstance(obj, _Place) else None


class _Place:
    def __init__(self, numel: int, key: str = "0") -> None:
        self.ids = ("storage", torch.FloatStorage, key, "cpu", numel)


def _tensor_pickle(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    rebuild = torch._utils._rebuild_tensor_v2
    call = _Runs(rebuild, _Place(numel), offset, size, stride, False, OrderedDict())
    file = io.BytesIO()
    _Referring(file, 2).dump({"a.weight": call})
    return file.getvalue()


def test_a_well_made_tensor_is_read(tmp_path: Path) -> None:
    path = archive(
        tmp_path / "good.pt", _tensor_pickle(4, 1, (3,), (1,)), {"data/0": struct.pack("<4f", 1, 2, 3, 4)}
    )
    assert read_foreign_checkpoint(path).state_dict["a.weight"].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride"),
    [
        (4, 2, (3,), (1,)),
        (4, 0, (2, 2), (3, 1)),
        (4, 0, (1000000, 1000000), (0, 0)),
        (4, -1, (3,), (1,)),
        (4, 0, (-3,), (1,)),
        (4, 0, (3,), (1, 1)),
        (5, 0, (5,), (1,)),
        (2**40, 0, (2**40,), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(
    tmp_path: Path, numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    path = archive(tmp_path / "bad.pt", _tensor_pickle(numel, offset, size, stride), {"data/0": bytes(16)})
    beyond = "impossible sizes|larger than its storage|cut short|too large"  # never a word of torch's own
    with pytest.raises(CheckpointError, match=rf"bad\.pt: .*({beyond})"):
        read_foreign_checkpoint(path)


def test_tensors_that_share_a_storage_may_not_be_together_larger_than_the_file(tmp_path: Path) -> None:
    file = io.BytesIO()
    call = _Runs(torch._utils._rebuild_tensor_v2, _Place(1000), 0, (1000,), (1,), False, OrderedDict())
    _Referring(file, 2).dump({f"{number}.weight": call for number in range(50)})
    path = archive(tmp_path / "bomb.pt", file.getvalue(), {"data/0": bytes(4000)})
    assert path.stat().st_size < 50 * 1000
    with pytest.raises(CheckpointError, match=r"bomb\.pt: its tensors are together larger than the file"):
        read_foreign_checkpoint(path)


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    """Each entry's numbers reach over the entries behind it, and their sums are right."""
    pickled, whole, raw = io.BytesIO(), tmp_path / "bomb.pt", io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    keys = [str(number) for number in range(50)]
    places = {key: _Runs(rebuild, _Place(1000, key), 0, (1,), (1,), False, OrderedDict()) for key in keys}
    _Referring(pickled, 2).dump(places)
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr("weights/data.pkl", pickled.getvalue())
        for key in keys:
            file.writestr(f"weights/data/{key}", b"")
        file.writestr("weights/rest", bytes(4000))
        for key in keys:
            entry = file.getinfo(f"weights/data/{key}")
            start = entry.header_offset + 30 + len(entry.filename)
            entry.file_size = entry.compress_size = 4000
            entry.CRC = zlib.crc32(raw.getvalue()[start : start + 4000])
    whole.write_bytes(raw.getvalue())
    # By us, or already by the archive's reader, which looks for it in newer Pythons.
    with pytest.raises(CheckpointError, match=r"bomb\.pt: .*(together larger than the file|Overlapped)"):
        read_foreign_checkpoint(whole)


def test_a_storage_described_in_two_ways_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    calls = [_Runs(rebuild, _Place(numel), 0, (1,), (1,), False, OrderedDict()) for numel in (4, 2)]
    _Referring(file, 2).dump({"a.weight": calls[0], "b.weight": calls[1]})
    path = archive(tmp_path / "two.pt", file.getvalue(), {"data/0": bytes(16)})
    with pytest.raises(CheckpointError, match="storage 0 is described in two ways"):
        read_foreign_checkpoint(path)


def test_modules_nested_beyond_reason_are_refused(tmp_path: Path) -> None:
    inner = b"cmodels.yolo\nModel\n)\x81}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00a"
    content = b"\x80\x02" + inner * 100 + b"N" + b"ssb" * 100 + b"."
    with pytest.raises(CheckpointError, match="nested deeper than 64"):
        read_foreign_checkpoint(archive(tmp_path / "deep.pt", content))


def test_a_huge_memo_index_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "memo.pt", b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(CheckpointError, match="the pickle's memo is larger"):
        read_foreign_checkpoint(path)


def test_a_compressed_entry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("weights/data.pkl", bytes(10_000_000))
    with pytest.raises(CheckpointError, match="compressed"):
        read_foreign_checkpoint(path)


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(classic: Path, tmp_path: Path, part: float) -> None:
    content = classic.read_bytes()
    path = tmp_path / "short.pt"
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CheckpointError, match=r"short\.pt"):
        read_foreign_checkpoint(path)


def test_one_flipped_bit_in_the_weights_is_noticed(classic: Path, tmp_path: Path) -> None:
    content = bytearray(classic.read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "flipped.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_foreign_checkpoint(path)


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="check the path"):
        read_foreign_checkpoint(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("not a zip")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_foreign_checkpoint(tmp_path / "text.pt")
    with pytest.raises(CheckpointError, match="no detector"):
        read_foreign_checkpoint(archive(tmp_path / "empty.pt", pickle.dumps({"epoch": 3}, 2)))
