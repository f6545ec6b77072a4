from __future__ import annotations

from pathlib import Path

import pytest

from starling import settings
from starling.cli import settings as settings_command
from starling.core.errors import ConfigError
from starling.tracking.events import EventLog
from starling.tracking.process import start_bridges


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STARLING_RUNS", str(tmp_path))
    return tmp_path / "settings.json"


def test_defaults_need_no_file(path: Path) -> None:
    assert settings.read() == settings.Settings(mlflow=True, tensorboard=True, register=True)
    assert not path.exists()


def test_a_change_lasts_until_reset() -> None:
    settings.update({"mlflow": False})
    assert settings.read().mlflow is False
    settings.reset()
    assert settings.read().mlflow is True


@pytest.mark.parametrize(
    ("word", "expected"), [("mlflow=False", False), ("mlflow=true", True), ("mlflow=off", False)]
)
def test_the_command_changes_a_setting(word: str, expected: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert settings_command.main([word]) == 0
    assert settings.read().mlflow is expected
    assert capsys.readouterr().out.startswith(f"mlflow={expected}\n")


@pytest.mark.parametrize("word", ["mlfow=False", "mlflow=maybe", "mlflow", "=True"])
def test_a_wrong_word_is_a_usage_error_and_changes_nothing(word: str, path: Path) -> None:
    assert settings_command.main([word]) == 2
    assert not path.exists()


def test_an_unknown_name_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    settings_command.main(["mlfow=False"])
    assert "did you mean 'mlflow'" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"mlflow": "no"}', '{"other": 1}', "[" * 99_999])
def test_a_damaged_file_names_the_remedy_and_reset_repairs_it(path: Path, damage: str) -> None:
    path.write_text(damage)
    with pytest.raises(ConfigError):
        settings.read()
    assert settings_command.main(["reset"]) == 0
    assert settings.read().mlflow is True


def test_without_a_runs_folder_the_users_configuration_folder_is_used() -> None:
    assert settings.settings_path({"XDG_CONFIG_HOME": "/c"}) == Path("/c/starling/settings.json")


def test_turned_off_means_no_bridge(tmp_path: Path) -> None:
    settings.update({"mlflow": False, "tensorboard": False, "clearml": False})
    log = EventLog(tmp_path / "run" / "events.jsonl", "u1")
    assert start_bridges(log).handles == ()
    assert not log.path.parent.exists()
