"""The embedded database: its address, a check that its tables match this MLflow, and their upgrade with a backup.

MLflow itself adds tables to an older database without notice and without a copy, and reports a newer one as outdated.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from pathlib import Path
from urllib.parse import quote

from starling.core.files.folder import Folder, LinkRefused
from starling.core.files.refusals import FileRefused
from starling.core.files.safe_open import open_folder
from starling.tracking.tracker import TrackerUnavailableError

_LOCKED_S = 30
"""Maximum seconds of waiting for a locked database; SQLite's 5 s are short for busy trainers on a slow disk."""


FOLDER, DATABASE = "mlflow", "mlflow.db"
"""The folder below the runs folder, and the file in it."""
_held: dict[Path, Folder] = {}
"""Kept open until the process ends, because SQLite opens the database repeatedly, and MLflow keeps the path."""


def database_uri(runs: Path) -> str:
    """Return the address of the embedded database."""
    return uri_of(runs.absolute() / FOLDER / DATABASE)


def uri_of(database: Path) -> str:
    """Return the address of the embedded database at a path."""
    return f"sqlite:///{database}?timeout={_LOCKED_S}"


def held_database(runs: Path) -> Path:
    """Return a path of the embedded database that stays valid if `<runs>/mlflow` is replaced.

    A missing folder is created; the folder is held open. Raises LinkRefused if it, or a file of the database, is
    a link, and FileRefused for a file with a second name.
    """
    path = runs.absolute() / FOLDER
    folder = open_folder(path, create=True)
    kept = _held.get(path)
    if kept is not None and os.path.samestat(os.fstat(kept.descriptor), os.fstat(folder.descriptor)):
        folder.close()
        folder = kept
    _held[path] = folder
    for name in folder.names():
        if name.startswith(DATABASE):
            _check_own(folder, name)
    return folder.proc_path / DATABASE


def _check_own(folder: Folder, name: str) -> None:
    """Raise for a file that is a link or has a second name. Not opened: closing it would release SQLite's locks."""
    state = folder.stat(name)
    if stat.S_ISLNK(state.st_mode):
        raise LinkRefused(folder.path / name)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
        raise FileRefused(folder.path / name, "is not a regular file with one name alone")


def check_schema(database: Path) -> None:
    """Raise TrackerUnavailableError, with the remedy, for a database whose tables have the version of another MLflow.

    MLflow itself creates or completes a database that is missing or has no experiment yet.
    """
    stored = _revision(database)
    if stored is None:
        return
    from mlflow.store.db.utils import _get_latest_schema_revision as latest

    if stored == (expected := latest()):
        return
    found = f"{database} has the tables of another MLflow (version {stored}, not {expected})"
    if _is_known(stored):
        raise TrackerUnavailableError(
            f"{found}, an older one; upgrade them, which keeps a copy: starling track upgrade"
        )
    raise TrackerUnavailableError(f"{found}, a newer one; use the MLflow, or the image, that wrote them last")


def upgrade_schema(database: Path) -> Path | None:
    """Upgrade the tables to this MLflow's version; return the backup, None if no upgrade was necessary.

    A failed upgrade restores everything and raises TrackerUnavailableError, as do tables of a newer MLflow.
    """
    from mlflow.store.db.utils import _get_latest_schema_revision, _upgrade_db, create_sqlalchemy_engine

    stored = _revision(database)
    if stored is None or stored == _get_latest_schema_revision():
        return None
    if not _is_known(stored):
        check_schema(database)
    copy = database.with_name(f"{database.name}.{stored}")
    _copy(database, copy)
    engine = create_sqlalchemy_engine(uri_of(held_database(database.parents[1])))
    try:
        _upgrade_db(engine)
    except BaseException as error:
        engine.dispose()
        _copy(copy, database)
        if isinstance(error, Exception):
            raise TrackerUnavailableError(f"{database}: {error}; the database has been restored") from error
        raise
    engine.dispose()
    return copy


def _copy(source: Path, target: Path) -> None:
    """Copy a database with SQLite's backup, which is consistent even while others write to it."""
    held = held_database(source.parents[1]).parent
    with (
        contextlib.closing(sqlite3.connect(held / source.name, timeout=_LOCKED_S)) as here,
        contextlib.closing(sqlite3.connect(held / target.name, timeout=_LOCKED_S)) as there,
    ):
        here.backup(there)


def _revision(database: Path) -> str | None:
    """Return the version of a database's tables; None without a database or without an experiment in it."""
    if not database.is_file():
        return None
    address = f"file:{quote(str(held_database(database.parents[1])))}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, timeout=_LOCKED_S, uri=True)) as connection:
        try:
            if connection.execute("SELECT 1 FROM experiments LIMIT 1").fetchone() is None:
                return None
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return None
            raise
    return str(row[0]) if row else None


def _is_known(revision: str) -> bool:
    """Return whether this MLflow knows a version of the tables; an unknown version belongs to a newer MLflow."""
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError
    from mlflow.store.db.utils import _get_alembic_config

    try:
        return ScriptDirectory.from_config(_get_alembic_config("")).get_revision(revision) is not None
    except CommandError:
        return False
