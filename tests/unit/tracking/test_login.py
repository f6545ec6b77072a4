"""The tracker's password comes from a file, each time it connects."""

from __future__ import annotations

from pathlib import Path

import pytest

from starling.tracking.mlflow.client import PASSWORD, PASSWORD_FILE, read_password
from starling.tracking.tracker import TrackerUnavailableError


def test_the_password_of_the_named_file_reaches_the_client_and_a_changed_one_too(tmp_path: Path) -> None:
    file, client = tmp_path / "password", {PASSWORD: "stale"}
    for password in ("first-secret", "second-secret"):
        file.write_text(f"{password}\n")
        read_password({PASSWORD_FILE: str(file)}, client)
        assert client[PASSWORD] == password


def test_without_the_variable_a_password_of_the_users_own_stays() -> None:
    client = {PASSWORD: "own"}
    read_password({}, client)
    assert client == {PASSWORD: "own"}


def test_a_file_that_cannot_be_read_is_an_outage_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(TrackerUnavailableError, match=r"MLFLOW_TRACKING_PASSWORD_FILE=.*gone.*No such file"):
        read_password({PASSWORD_FILE: str(tmp_path / "gone")}, {})
