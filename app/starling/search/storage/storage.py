"""The storage of a study: a journal in the search's folder, or a PostgreSQL database for workers on many hosts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import optuna
from optuna.storages import BaseStorage

from starling.core.errors import UsageError
from starling.core.files.file_system import network_file_system
from starling.core.files.safe_open import make_folder, runs_root
from starling.core.settings.study_url import parse_study_url
from starling.search.storage.journal import JournalStudyStorage, writing
from starling.search.storage.leases import Lease, LeaseWatch

T = TypeVar("T")
P = ParamSpec("P")


class StudyStorage(Protocol):
    """The storage of a study and of its workers' leases, with one lock that makes several steps atomic."""

    where: str
    """The journal's path or the database's URL, for messages."""
    study_name: str
    """The study's name in the storage."""
    spans_hosts: bool
    """Whether workers of this study may have no access to each other's folders."""

    @property
    def optuna(self) -> BaseStorage:
        """The storage for Optuna."""

    def lock(self) -> AbstractContextManager[None]:
        """Exclude all other workers of the study while the context lasts. Not reentrant.

        All writes inside the context happen under the lock, or not at all.
        """

    def persist(self, operation: Callable[[], T]) -> T:
        """Run an operation on the study, and repeat it for a while if the storage is unreachable.

        A repeated `operation` may have been interrupted half-way before.
        """

    def take_lease(self, number: int, worker: str) -> Lease:
        """Take the lease of a candidate before the candidate is recorded. The caller holds the study's lock."""

    def watch(self, lease_s: float, monotonic: Callable[[], float] = time.monotonic) -> LeaseWatch:
        """Return an observer of other workers' leases."""


def persistent(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Let a method of an object with a `_storage` outlast an outage of the storage: see `StudyStorage.persist`."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> T:
        storage: StudyStorage = args[0]._storage
        return storage.persist(lambda: method(*args, **kwargs))

    return call


def open_storage(
    url: str,
    directory: Path,
    *,
    create: bool = True,
    check_stop: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] = os.environ,
) -> StudyStorage:
    """Open the storage that `--study` names: a database, or if `url` is empty, the journal in `directory`.

    What keeps a worker waiting is logged; `check_stop` is called meanwhile, to raise Stopped.
    Without `create` the study is only looked at, and has to be there. `environment` says where passwords are.

    Raises UsageError for a bad URL or an unsuitable server, ServerError for a server that does not answer.
    """
    directory = directory.absolute()
    if create:
        with writing(directory):
            make_folder(directory)
    if not url:
        return JournalStudyStorage(directory, create=create)
    from starling.search.storage.database_storage import (
        DatabaseStudyStorage,  # SQLAlchemy is slow to import, and few need it
    )

    return DatabaseStudyStorage(
        parse_study_url(url),
        study_name(directory),
        create=create,
        check_stop=check_stop,
        environment=environment,
    )


def load_study(storage: StudyStorage) -> optuna.Study | None:
    """Return the study as an Optuna study; None if the storage does not have it."""
    if storage.study_name not in [study.study_name for study in storage.optuna.get_all_studies()]:
        return None
    return optuna.load_study(study_name=storage.study_name, storage=storage.optuna)


def check_storage(url: str, directory: Path, *, allow_nfs: bool = False) -> None:
    """Raise, before any work is done, the errors of a storage that cannot hold a study: see `open_storage`.

    A journal needs locks that all workers' hosts obey. Raises UsageError if `directory` lies on a file system
    that several machines can mount, unless `allow_nfs`.
    """
    if url:
        from starling.search.storage.database_storage import DatabaseStudyStorage

        DatabaseStudyStorage(parse_study_url(url), study_name(directory)).close()
        return
    kind = None if allow_nfs else network_file_system(directory)
    if kind is not None:
        raise UsageError(
            f"{directory}: lies on a network file system ({kind}), where workers of two hosts may both hold the "
            "study's lock and overwrite each other's results; keep the study in a database with "
            "--study postgresql://user@host/database (docs/scale-out.md), or say with --allow-nfs that all workers run "
            "on this host or that this mount's locks hold between hosts"
        )


def study_name(directory: Path) -> str:
    """Return a search's name in a database: `project/name`, the same on every host.

    The name is the folder's path below the runs folder; for a folder elsewhere, its last two parts.
    """
    directory, root = directory.absolute(), runs_root()
    if directory != root and directory.is_relative_to(root):
        return directory.relative_to(root).as_posix()
    return "/".join(directory.parts[-2:])
