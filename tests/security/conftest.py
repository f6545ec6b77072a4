"""Attacks, and the trainers they are tried on."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app import settings
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
