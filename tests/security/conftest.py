"""Attacks, and the trainers they are tried on."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from starling import settings
from tests.conftest import REPOSITORY
from tests.crash.conftest import start as start


@pytest.fixture(autouse=True)
def no_tracking(runs: Path) -> None:
    """Keep the bridge out: it has tests of its own, and importing MLflow takes seconds."""
    settings.update({"mlflow": False, "tensorboard": False})


class Malicious:
    """What touches the sentinel when a file that holds it is unpickled without care."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.sentinel}",)


def _as_ours(path: Path, evil: Malicious) -> None:
    torch.save({"format": "starling-1", "kind": "resumable", "epoch": 0, "ema": evil, "digest": ""}, path)


def _as_foreign(path: Path, evil: Malicious) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", pickle.dumps({"model": evil}, 2))


def _as_old_torch(path: Path, evil: Malicious) -> None:
    torch.save({"format": "starling-1", "model": evil}, path, _use_new_zipfile_serialization=False)


def _as_bare_pickle(path: Path, evil: Malicious) -> None:
    path.write_bytes(pickle.dumps(evil))


FORMS: dict[str, Callable[[Path, Malicious], None]] = {
    "ours": _as_ours,
    "foreign": _as_foreign,
    "old torch": _as_old_torch,
    "bare pickle": _as_bare_pickle,
}


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "touched"


@pytest.fixture(params=FORMS)
def attack(request: pytest.FixtureRequest, sentinel: Path) -> Callable[[Path], None]:
    """Return a function that writes a malicious file; each form a checkpoint can have."""
    return lambda path: FORMS[request.param](path, Malicious(sentinel))


@pytest.fixture
def attack_as_ours(sentinel: Path) -> Callable[[Path], None]:
    return lambda path: _as_ours(path, Malicious(sentinel))


Measured = Callable[..., list[str]]

_MEASURE = """
import resource, sys, time
from pathlib import Path
from starling.core.errors import StarlingError
{setup}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
idle = peak()
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for path in map(Path, sys.argv[2:]):
    began = time.monotonic()
    try:
        read(path)
        said = "taken"
    except StarlingError as error:
        said = str(error)
    seconds = time.monotonic() - began
    assert seconds < 20, f"{{path}} took {{seconds:.1f}} s"
    assert peak() - idle < int(sys.argv[1]), f"{{path}} took {{peak() - idle >> 20}} MiB: {{said}}"
    print(said.replace(chr(10), " "))
"""


@pytest.fixture
def measured() -> Measured:
    """Return what reads files in a process of its own, and holds its time and memory: `setup` defines `read(path)`.

    The result is what was said of each file: "taken", or the message.
    """

    def measure(setup: str, files: list[Path], most_bytes: int = 1 << 30) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE.format(setup=setup), str(most_bytes), *map(str, files)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return measure
