"""Datasets of a ClearML server: downloaded for `--data clearml://ID`, and uploaded as a new version."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starling.core.errors import DataError
from starling.errors import ServerError
from starling.tracking.clearml import DATASET_SCHEME
from starling.tracking.clearml.client.api import UPLOAD_BYTES_PER_S, ClearmlApi, ClearmlRefusedError
from starling.tracking.clearml.client.credentials import REMEDY, find_credentials
from starling.tracking.clearml.client.sdk import CHUNK_BYTES, IDLE_S, bytes_below, run_sdk

logger = logging.getLogger(__name__)

_DONE = {"completed", "published", "closed"}
_PATIENCE_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A version of a dataset on the server."""

    id: str
    project: str
    name: str
    version: str
    added: int
    modified: int
    removed: int

    @property
    def url(self) -> str:
        """The value for `--data`."""
        return f"{DATASET_SCHEME}{self.id}"


class DatasetServer:
    """The datasets of the ClearML server that the environment names.

    Messages begin with `called`: the flag or folder that the command is about. Every method raises DataError for
    missing credentials, an unknown or unfinished dataset, and a server that is unreachable or refuses.
    """

    def __init__(self, called: str, environment: Mapping[str, str] = os.environ) -> None:
        self._called, self._environment = called, environment

    def download(
        self,
        identity: str,
        folder: Path,
        scratch: Path,
        show: Callable[[Callable[[], str]], None],
    ) -> dict[str, Any]:
        """Put the files of a dataset into `folder`, inside `scratch`; return the SDK's description of the dataset."""
        with self._named():
            api = self._api()
            task = self._finished(api, identity, self._called)
            api.close()
            logger.info(
                f"fetching {DATASET_SCHEME}{identity} ({task['name']}) from {api.credentials.files_host}"
            )

            def show_size(size: int) -> None:
                show(lambda: f"{DATASET_SCHEME}{identity}: {size / 1e6:.0f} MB")

            return run_sdk(
                "fetch", identity, str(folder), folder=scratch, environment=self._environment, show=show_size
            )

    def upload(self, folder: Path, *, project: str, name: str, version: str, parent: str) -> Version:
        """Make a new version of a dataset of what `folder` holds: create, sync, upload and close.

        With `parent`, only the changes since that dataset are uploaded.
        """
        parent = parent.removeprefix(DATASET_SCHEME)
        with self._named():
            api = self._api()
            if parent:
                self._finished(api, parent, f"--parent {parent}")
            api.close()
            logger.info(f"uploading what is new to {api.credentials.files_host}")
            chunk = min(bytes_below(folder), CHUNK_BYTES)
            parents = [parent] if parent else []
            with tempfile.TemporaryDirectory(prefix="starling-version-") as scratch:
                answer = run_sdk(
                    "create", str(folder), project, name, version, *parents, folder=Path(scratch),
                    environment=self._environment, idle_s=IDLE_S + chunk / UPLOAD_BYTES_PER_S,
                )  # fmt: skip
        return Version(**answer)

    def _api(self) -> ClearmlApi:
        credentials = find_credentials(self._environment)
        if credentials is None:
            raise DataError(f"{self._called}: ClearML is not configured: {REMEDY}")
        return ClearmlApi(credentials, patience_s=_PATIENCE_S)

    @staticmethod
    def _finished(api: ClearmlApi, identity: str, called: str) -> dict[str, Any]:
        """Return the task behind a dataset; raises DataError if it is unknown, unfinished or another kind of task."""
        host = api.credentials.api_host
        try:
            task = dict(api.call("tasks.get_by_id", task=identity)["task"])
        except ClearmlRefusedError as error:
            if error.status == 401:
                raise
            raise DataError(
                f"{called}: {host} has no dataset of this id; copy it from the dataset's page, and check that the "
                "credentials are of its workspace"
            ) from None
        if "dataset" not in (task.get("system_tags") or []):
            raise DataError(
                f"{called}: is a task ({task.get('type')} {task.get('name')!r}), not a dataset; take a dataset's id"
            )
        if task.get("status") not in _DONE:
            raise DataError(
                f"{called}: the dataset is not finished (its state is {task.get('status')}); "
                f"close it: clearml-data close --id {identity}"
            )
        return task

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn an error of the server or the SDK into a DataError that begins with `called`."""
        try:
            yield
        except ServerError as error:
            raise DataError(f"{self._called}: {error}; nothing was left behind") from None
