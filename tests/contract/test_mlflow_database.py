"""The embedded database, and one that an older or a newer MLflow made: real tables of MLflow's own migrations."""

from __future__ import annotations

import importlib.util
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from starling.cli import track
from starling.tracking.mlflow.database import database_uri
from starling.tracking.mlflow.tracker import MlflowTracker
from starling.tracking.tracker import Run, TrackerUnavailableError
from tests.conftest import REPOSITORY

pytest.importorskip("mlflow")
NEWER = "UPDATE alembic_version SET version_num = 'f1e2d3'"


@pytest.fixture(scope="module")
def made_by_the_older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an embedded database that holds a run, as the MLflow before the last change of the tables left it."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config

    runs = tmp_path_factory.mktemp("older")

    def go_back(connection: Any) -> None:
        config = _get_alembic_config(database_uri(runs))
        config.attributes["connection"] = connection
        command.downgrade(config, "-1")

    start(runs, "old")
    change(runs, go_back)
    return runs / "mlflow" / "mlflow.db"


@pytest.fixture
def database(made_by_the_older: Path, runs: Path) -> Path:
    """Return that database in the test's own runs folder."""
    folder = runs / "mlflow"
    folder.mkdir(parents=True)
    return shutil.copyfile(made_by_the_older, folder / "mlflow.db")


def start(runs: Path, uuid: str) -> str:
    run = Run(uuid=uuid, name=uuid, project="p", time=1e9, params={"epochs": 3}, tags={})
    return MlflowTracker(runs, {}).start_run(run)


def change(runs: Path, how: Callable[[Any], object]) -> None:
    from mlflow.store.db.utils import create_sqlalchemy_engine

    engine = create_sqlalchemy_engine(database_uri(runs))
    with engine.begin() as connection:
        how(connection)
    engine.dispose()


def test_an_older_one_is_left_alone_until_it_is_upgraded_with_a_copy_kept(
    database: Path, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.db import utils
    from mlflow.tracking.client import MlflowClient

    older = database.read_bytes()
    with pytest.raises(TrackerUnavailableError, match=r"an older one; .*: starling track upgrade"):
        start(runs, "new")
    assert track.main(["ui"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert database.read_bytes() == older

    def fail(engine: Any) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE params")
        raise RuntimeError("half done")

    with monkeypatch.context() as patch:
        patch.setattr(utils, "_upgrade_db", fail)
        assert track.main(["upgrade"]) == 1
    assert "half done; the database has been restored" in capsys.readouterr().err

    assert track.main(["upgrade"]) == 0
    [copy] = database.parent.glob("mlflow.db.*")
    assert str(copy) in capsys.readouterr().out
    assert {start(runs, "new"), start(runs, "old")} == {
        run.info.run_id for run in MlflowClient(tracking_uri=database_uri(runs)).search_runs(["1"])
    }
    assert track.main(["upgrade"]) == 0
    assert "nothing to upgrade" in capsys.readouterr().out


def test_a_newer_one_is_told_apart_and_never_changed(
    database: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(runs, lambda connection: connection.exec_driver_sql(NEWER))
    newer = database.read_bytes()
    with pytest.raises(TrackerUnavailableError, match="a newer one; use the MLflow, or the image"):
        start(runs, "new")
    assert track.main(["upgrade"]) == 1
    assert "a newer one" in capsys.readouterr().err
    assert database.read_bytes() == newer


def test_a_database_that_others_hold_is_waited_for_longer_than_sqlites_five_seconds(runs: Path) -> None:
    (runs / "mlflow").mkdir(parents=True)
    waits: list[int] = []
    change(runs, lambda connection: waits.append(connection.exec_driver_sql("PRAGMA busy_timeout").scalar()))
    assert waits == [30_000]


@pytest.fixture
def serve() -> ModuleType:
    """Return the program that the image of the MLflow server runs."""
    spec = importlib.util.spec_from_file_location("serve", REPOSITORY / "deploy" / "mlflow" / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_servers_container_says_once_what_upgrades_its_database_and_waits_for_that(
    database: Path, runs: Path, serve: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    serve.SCHEMA_POLL_S = 0.05
    waiter = threading.Thread(target=serve.wait_for_schema, args=[database_uri(runs)], daemon=True)
    waiter.start()
    time.sleep(0.5)
    assert waiter.is_alive()
    serve.upgrade(database_uri(runs))
    waiter.join(10)
    assert not waiter.is_alive()
    said = capsys.readouterr().err
    assert said.count("an older MLflow") == 1
    assert "launcher track backup FILE" in said
    assert "docker compose exec mlflow python /usr/local/lib/starling/serve.py upgrade" in said

    change(runs, lambda connection: connection.exec_driver_sql(NEWER))
    assert "a newer MLflow" in serve.schema_problem(database_uri(runs))
    with pytest.raises(SystemExit, match="a newer MLflow"):
        serve.upgrade(database_uri(runs))
