"""MLflow as a tracker: a server named by `MLFLOW_TRACKING_URI`, else a SQLite database under `<runs>/mlflow`.

Measured with mlflow 3.17.2 on 2 cores: importing the parts used here costs 1.6-2 s of CPU and 220 MB once, creating
the database 0.7 s, an epoch of 13 values 4-12 ms. Only the bridge imports the library, at the first event.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time as time_module
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starling.core.errors import UsageError
from starling.core.files.atomic import write_atomic
from starling.core.paths import real_path
from starling.core.redaction import without_credentials
from starling.tracking.lock import exclusive
from starling.tracking.mlflow.client import CLIENT_LIMITS, patient, read_password, translated
from starling.tracking.mlflow.database import (
    FOLDER,
    check_schema,
    database_uri,
    held_database,
    upgrade_schema,
    uri_of,
)
from starling.tracking.mlflow.images import as_shown
from starling.tracking.mlflow.names import (
    KEY_LENGTH,
    TAG_LENGTH,
    end_tags,
    flat_params,
    metric_key,
    outdated_tags,
)
from starling.tracking.tracker import (
    DatasetInput,
    ModelFile,
    Run,
    TrackerRejectedError,
    TrackerUnavailableError,
)

UUID_TAG = "starling.run_uuid"
PARENT_TAG = "mlflow.parentRunId"

_LOCK_TIMEOUT_S = 120.0
"""A bridge has low priority beside busy trainers; the first one may take a minute to create the database."""
_MODEL_TIMEOUT_S = 1200.0
_PROXIED = "mlflow-artifacts"
_DATABASES = {"sqlite", "postgresql", "mysql", "mssql"}
_STATUSES = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED", "pruned": "FINISHED"}
_PARAMS_PER_REQUEST = 100
_DATASET_NAME_LENGTH = 500
_DIGEST_LENGTH = 36
_SCHEMA_LENGTH = 60_000
_CONSOLE = "console.log"
_CONSOLE_EVERY_S = 20.0
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""The page opens on trainings, not on chats with language models."""


class MlflowTracker:
    """Send runs to MLflow; see the `Tracker` protocol.

    `environment` gives `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME` (default: the run's project), `MLFLOW_RUN`
    (default: the run's name; in a search, the name of the parent), and `MLFLOW_KEEP_RUN_ACTIVE`.
    """

    name = "mlflow"

    def __init__(self, runs: Path, environment: Mapping[str, str], *, register: bool = False) -> None:
        """Use the database of `runs`, or the server that the environment names; `register`: register best models."""
        self._register = register
        self._folder = runs.absolute() / FOLDER
        self._database = self._folder / "mlflow.db"
        self._environment = environment
        self._uri = environment.get("MLFLOW_TRACKING_URI") or ""
        self._is_embedded = not self._uri
        self._uri = self._uri or database_uri(runs)
        self._experiments: dict[str, str] = {}
        self._connected: Any = None
        self._consoles: dict[str, Callable[[], str]] = {}
        """Run -> function that returns its whole console, for runs whose console has grown since it was sent."""
        self._console_sent_at = -_CONSOLE_EVERY_S

    def destination(self, log_dir: Path) -> str:
        """Name the database by its path relative to the log, or the server by its address without credentials."""
        if self._is_embedded:
            return "embedded:" + os.path.relpath(self._folder, log_dir)
        return without_credentials(self._uri).partition("?")[0]

    def start_run(self, run: Run) -> str:
        """Find or create the run, and its parent, by the run's UUID; a resumed run continues under the same id."""
        with translated(refuse=False), self._one_at_a_time():
            client = self._client()
            experiment = self._experiment(run.project)
            tags = {"mlflow.source.name": "starling", "mlflow.source.type": "LOCAL"}
            if user := self._environment.get("USER"):
                tags["mlflow.user"] = user
            if run.parent_uuid:
                name = self._run_name(run.parent_name)
                parent = self._find_or_create(experiment, run.parent_uuid, name, run.time, tags)
                run_id = self._find_or_create(
                    experiment, run.uuid, run.name, run.time, {**tags, PARENT_TAG: parent}
                )
            else:
                run_id = self._find_or_create(experiment, run.uuid, self._run_name(run.name), run.time, tags)
        with translated(refuse=False):
            stored = client.get_run(run_id)
            for tag in outdated_tags(stored.data.tags):
                client.delete_tag(run_id, tag)
            if stored.info.status != "RUNNING":
                client.update_run(run_id, status="RUNNING")
            self._describe(run_id, run, stored.data.params)
        return run_id

    def log_metrics(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        """Record values; MLflow stores a value with equal time and step once."""
        from mlflow.entities import Metric

        at = int(time * 1000)
        with translated():
            metrics = [Metric(metric_key(name), value, at, step) for name, value in values.items()]
            self._client().log_batch(run_id, metrics=metrics)

    def log_artifact(self, run_id: str, path: Path, folder: str, *, kind: str = "") -> None:
        """Store a file. If the server's proxy would serve it from a local folder, the file is copied there directly."""
        with translated(), patient():
            client = self._client()
            local = self._local_folder(str(client.get_run(run_id).info.artifact_uri))
            if local is not None:
                self._copy(path, local / folder / path.name)
            else:
                client.log_artifact(run_id, str(path), folder or None)

    def log_dataset(self, run_id: str, dataset: DatasetInput) -> None:
        """Record a dataset as an input of the run: digest, source, and content."""
        from mlflow.entities import Dataset, InputTag
        from mlflow.entities import DatasetInput as Input

        shown = Dataset(
            name=dataset.name[:_DATASET_NAME_LENGTH],
            digest=dataset.digest[:_DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": without_credentials(dataset.source)}),
            schema=json.dumps({"classes": dataset.classes})[:_SCHEMA_LENGTH],
            profile=json.dumps(dict(dataset.figures)),
        )
        context = InputTag("mlflow.data.context", {"train": "training", "val": "validation"}[dataset.role])
        with translated():
            self._client().log_inputs(run_id, [Input(shown, [context])])

    def log_image(self, run_id: str, path: Path, name: str, *, step: int, time: float) -> None:
        """Show an image in the page's image chart; its file name contains a digest, so that it is stored once."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                files = as_shown(path, metric_key(name), step, time, Path(folder))
            except OSError as error:
                raise TrackerRejectedError(f"{path}: no image ({error})") from None
            for file in files:
                self.log_artifact(run_id, file, "images")
        with translated():
            self._client().set_tag(run_id, "mlflow.loggedImages", "True")

    def log_console(self, run_id: str, line: str, so_far: Callable[[], str], *, time: float) -> None:
        """Keep the console for `flush`: MLflow has only files, so that the whole console is sent again."""
        self._consoles[run_id] = so_far

    def log_system(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        """Record a sample among the metrics that the page shows as system metrics."""
        self.log_metrics(run_id, values, step=step, time=time)

    def flush(self, *, last: bool = False) -> None:
        """Send consoles that have grown, every 20 seconds and at the end of a run."""
        now = time_module.monotonic()
        if not self._consoles or not (last or now - self._console_sent_at >= _CONSOLE_EVERY_S):
            return
        self._console_sent_at = now
        for run_id, so_far in list(self._consoles.items()):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / _CONSOLE
                file.write_text(so_far())
                try:
                    self.log_artifact(run_id, file, "")
                except TrackerRejectedError:
                    del self._consoles[run_id]
                    raise
            del self._consoles[run_id]

    def log_model(self, run_id: str, model: ModelFile) -> None:
        """Register the best weights of a finished run, ready to be served; other weights are only artifacts."""
        if self._register and model.name == "best":
            from starling.tracking.mlflow.models import offer

            # Every worker of a search offers the same winner.
            with translated(), patient(), self._one_at_a_time(".models.lock", _MODEL_TIMEOUT_S):
                client = self._client()
                offer(client, client.get_run(run_id), model, self._upload_model)

    def end_run(self, run_id: str, status: str, reason: str, *, time: float) -> None:
        """Record how the run ended, and end it unless it must be kept active."""
        keep = self._environment.get("MLFLOW_KEEP_RUN_ACTIVE", "").lower() in {"true", "1"}
        with translated():
            client = self._client()
            self._set_tags(run_id, end_tags(status, reason, client.get_run(run_id).data.tags))
            if not keep:
                client.set_terminated(run_id, _STATUSES[status], end_time=int(time * 1000))

    def close(self) -> None:
        """Drop the client; its connections close with it."""
        self._connected = None

    @property
    def client(self) -> Any:
        """MLflow's own client, with the limits of this project; for its exceptions see `errors_as_ours`."""
        with self.errors_as_ours():
            return self._client()

    @staticmethod
    def errors_as_ours() -> AbstractContextManager[None]:
        """Turn exceptions of MLflow inside the block into the errors of the protocol."""
        return translated()

    def find_run(self, name: str) -> str:
        """Return the id of a run by its UUID or by MLflow's id; raises UsageError for an unknown run."""
        quoted = re.sub(r"[^\w.:-]", "", name)
        with self.errors_as_ours():
            client = self._client()
            experiments = [found.experiment_id for found in client.search_experiments()]
            for known in (f"tags.`{UUID_TAG}` = '{quoted}'", f"attributes.run_id = '{quoted}'"):
                found = client.search_runs(experiments, known, max_results=1)
                if found:
                    return str(found[0].info.run_id)
        raise UsageError(
            f"{name}: no such run at {without_credentials(self._uri)}; give a run directory, or the run's id in MLflow "
            "(starling track sync DIR sends unsent events)"
        )

    def create_database(self) -> None:
        """Create the embedded database if it is missing; raises TrackerUnavailableError, also for another version."""
        with translated(refuse=False):
            if self._database.exists():
                check_schema(self._database)
            else:
                with self._one_at_a_time():
                    self._client()

    def upgrade_database(self) -> Path | None:
        """Upgrade the embedded database to this MLflow's version; return the backup, None if it is current."""
        with translated(refuse=False), self._one_at_a_time():
            return upgrade_schema(self._database)

    def _client(self) -> Any:
        if self._connected is None:
            self._connected = self._connect()
        return self._connected

    def _connect(self) -> Any:
        for name, value in CLIENT_LIMITS.items():
            os.environ.setdefault(name, value)
        read_password(self._environment, os.environ)
        warnings.filterwarnings("ignore", module=r"(mlflow|alembic|sqlalchemy)(\..*)?")
        from mlflow.tracking.client import MlflowClient

        for chatty in ("mlflow", "alembic", "sqlalchemy"):
            logging.getLogger(chatty).setLevel(logging.CRITICAL)
        if self._is_embedded:
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            check_schema(self._database)
            uri = uri_of(held_database(self._folder.parent))
            # Opening an empty database creates its tables: the caller holds the lock.
            SqlAlchemyStore(uri, f"{_PROXIED}:/")
            return MlflowClient(tracking_uri=uri)
        return MlflowClient(tracking_uri=self._uri)

    @contextmanager
    def _one_at_a_time(self, name: str = ".lock", timeout_s: float = _LOCK_TIMEOUT_S) -> Iterator[None]:
        """Keep the bridges of several containers from creating the same object twice."""
        try:
            with exclusive(self._folder / name, timeout_s):
                yield
        except TimeoutError as error:
            raise TrackerUnavailableError(str(error)) from None

    def _experiment(self, project: str) -> str:
        name = self._environment.get("MLFLOW_EXPERIMENT_NAME") or project or "Default"
        if name not in self._experiments:
            client = self._client()
            found = client.get_experiment_by_name(name)
            if found is None:
                self._experiments[name] = client.create_experiment(
                    name, self._artifact_location(name), tags=_EXPERIMENT_TAGS
                )
            elif found.lifecycle_stage != "active":
                raise TrackerUnavailableError(
                    f"the MLflow experiment {name!r} is deleted; restore it (mlflow experiments restore), "
                    "or name another with MLFLOW_EXPERIMENT_NAME"
                )
            else:
                self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _artifact_location(self, experiment: str) -> str | None:
        """Return the artifact location of a new experiment; None lets the server choose.

        A path in the database would be valid either in the container or on the host. The proxy's scheme is valid
        in both: `track ui` and this tracker resolve it to `<runs>/mlflow/artifacts`.
        """
        if urlsplit(self._uri).scheme.partition("+")[0] not in _DATABASES:
            return None
        return f"{_PROXIED}:/{hashlib.sha256(experiment.encode()).hexdigest()[:16]}"

    def _run_name(self, name: str) -> str:
        return self._environment.get("MLFLOW_RUN") or name

    def _find_or_create(
        self, experiment: str, uuid: str, name: str, time: float, tags: Mapping[str, str]
    ) -> str:
        client = self._client()
        quoted = re.sub(r"[^\w.:-]", "", uuid)
        found = client.search_runs([experiment], f"tags.`{UUID_TAG}` = '{quoted}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        created = client.create_run(
            experiment, start_time=int(time * 1000), tags={**tags, UUID_TAG: quoted}, run_name=name
        )
        return str(created.info.run_id)

    def _describe(self, run_id: str, run: Run, stored: Mapping[str, str]) -> None:
        """Send parameters and tags; a parameter that a resume changed keeps its first value, and a tag names it."""
        from mlflow.entities import Param

        params = flat_params(run.params)
        changed = [
            f"{key}: {stored[key]} -> {value}"
            for key, value in params.items()
            if stored.get(key, value) != value and key != "resume"
        ]
        tags = {key[:KEY_LENGTH]: str(value)[:TAG_LENGTH] for key, value in run.tags.items()}
        if "git_commit" in tags:
            tags["mlflow.source.git.commit"] = tags["git_commit"]
        if changed:
            tags["starling.changed_on_resume"] = "; ".join(changed)[:TAG_LENGTH]
        client = self._client()
        new = [Param(key, value) for key, value in params.items() if key not in stored]
        for batch in (new[at : at + _PARAMS_PER_REQUEST] for at in range(0, len(new), _PARAMS_PER_REQUEST)):
            client.log_batch(run_id, params=batch)
        if tags:
            self._set_tags(run_id, tags)

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client().log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _local_folder(self, location: str) -> Path | None:
        """Return the local folder of an artifact location; None if the server stores artifacts.

        Raises TrackerRejectedError for a location outside of the server: it may be a folder of this machine or of a
        third party.
        """
        parts = urlsplit(location)
        if urlsplit(self._uri).scheme in {"http", "https"}:
            if parts.scheme != _PROXIED or parts.netloc:
                raise TrackerRejectedError(
                    f"the server keeps artifacts at {without_credentials(location)}, outside itself; "
                    "start it with --serve-artifacts and an mlflow-artifacts:/ root"
                )
            return None
        return self._folder / "artifacts" / parts.path.lstrip("/") if parts.scheme == _PROXIED else None

    def _upload_model(self, logged: Any, packed: Path) -> None:
        local = self._local_folder(str(logged.artifact_location))
        if local is None:
            self._client().log_model_artifacts(logged.model_id, str(packed))
            return
        for file in sorted(path for path in packed.rglob("*") if path.is_file()):
            self._copy(file, local / file.relative_to(packed))

    def _copy(self, source: Path, target: Path) -> None:
        root = real_path(self._folder / "artifacts")
        if not real_path(target).is_relative_to(root):
            raise TrackerRejectedError(f"{target} is outside {root}")
        with open(source, "rb") as file:
            write_atomic(target, lambda out: shutil.copyfileobj(file, out))
