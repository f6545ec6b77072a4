"""MLflow as a tracker: a server named by `MLFLOW_TRACKING_URI`, else a SQLite database under `<runs>/mlflow`.

Measured with mlflow 3.17.2 on 2 cores: importing what is used here costs 1.6-2 s of CPU and 220 MB once, creating
the database 0.7 s, an epoch of 13 values 4-12 ms. The library is imported at the first event, and only in the bridge.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from app.outputs.atomic import write_atomic
from app.tracking.lock import exclusive
from app.tracking.tracker import Run, TrackerRejectedError, TrackerUnavailableError

UUID_TAG = "starling.run_uuid"
PARENT_TAG = "mlflow.parentRunId"

CLIENT_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    # A server may neither hold the client for as long as it likes nor send it elsewhere.
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_ALLOW_HTTP_REDIRECTS": "false",
    # Nothing but the tracking server is spoken to.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
}
"""Settings of MLflow's client; by default it blocks for minutes when its server is gone. A user's own win."""

_UPLOAD_TIMEOUT_S = 60
_LOCK_TIMEOUT_S = 120.0
"""A bridge runs at low priority beside busy trainers; the first one may take a minute to create the database."""
_PROXIED = "mlflow-artifacts"
_DATABASES = {"sqlite", "postgresql", "mysql", "mssql"}
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
_STATUSES = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED", "pruned": "FINISHED"}
_KEY_LENGTH = 250
_VALUE_LENGTH = 6000
_TAG_LENGTH = 5000
_PARAMS_PER_REQUEST = 100


class MlflowTracker:
    """Feed MLflow; see the `Tracker` protocol.

    `environment` gives `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME` (else the run's project), `MLFLOW_RUN`
    (else its name; of a search, the parent's), and `MLFLOW_KEEP_RUN_ACTIVE`.
    """

    name = "mlflow"

    def __init__(self, runs: Path, environment: Mapping[str, str]) -> None:
        self._folder = runs / "mlflow"
        self._environment = environment
        self._uri = environment.get("MLFLOW_TRACKING_URI") or ""
        self._is_embedded = not self._uri
        self._uri = self._uri or database_uri(runs)
        self._experiments: dict[str, str] = {}
        self._connected: Any = None

    def destination(self, log_dir: Path) -> str:
        """Name the database by its path seen from the log, or the server by its address without credentials."""
        if self._is_embedded:
            return "embedded:" + os.path.relpath(self._folder, log_dir)
        return without_credentials(self._uri).partition("?")[0]

    def start_run(self, run: Run) -> str:
        """Find or create the run, and its parent, by our UUID; a resumed run goes on as the same one."""
        with _translated(refuse=False), self._one_at_a_time():
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
        with _translated(refuse=False):
            stored = client.get_run(run_id)
            if stored.info.status != "RUNNING":
                client.update_run(run_id, status="RUNNING")
            self._describe(run_id, run, stored.data.params)
        return run_id

    def log_metrics(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        """Record values; MLflow takes the same value with the same time and step once."""
        from mlflow.entities import Metric

        at = int(time * 1000)
        with _translated():
            metrics = [Metric(metric_key(name), value, at, step) for name, value in values.items()]
            self._client().log_batch(run_id, metrics=metrics)

    def log_artifact(self, run_id: str, path: Path, folder: str) -> None:
        """Store a file. What the proxy of a server would serve goes straight to its folder when that is ours."""
        with _translated(), self._patient():
            client = self._client()
            location = str(client.get_run(run_id).info.artifact_uri)
            parts = urlsplit(location)
            speaks_http = urlsplit(self._uri).scheme in {"http", "https"}
            if speaks_http and (parts.scheme != _PROXIED or parts.netloc):
                # The server chose this place: it may be a folder of this machine, or a third party.
                raise TrackerRejectedError(
                    f"the server keeps artifacts at {without_credentials(location)}, outside itself; "
                    "start it with --serve-artifacts and an mlflow-artifacts:/ root"
                )
            if not speaks_http and parts.scheme == _PROXIED:
                self._copy(path, self._folder / "artifacts" / parts.path.lstrip("/") / folder / path.name)
            else:
                client.log_artifact(run_id, str(path), folder or None)

    def end_run(self, run_id: str, status: str, reason: str, *, time: float) -> None:
        """Set the final status; a pruned candidate is a finished run with the tag `starling.pruned`."""
        if self._environment.get("MLFLOW_KEEP_RUN_ACTIVE", "").lower() in {"true", "1"}:
            return
        with _translated():
            client = self._client()
            if status == "pruned":
                client.set_tag(run_id, "starling.pruned", "true")
            if reason:
                client.set_tag(run_id, "starling.reason", reason[:_TAG_LENGTH])
            client.set_terminated(run_id, _STATUSES[status], end_time=int(time * 1000))

    def close(self) -> None:
        """Forget the client; its connections close with it."""
        self._connected = None

    def create_database(self) -> None:
        """Create the embedded database if it does not exist; raises TrackerUnavailableError."""
        if not (self._folder / "mlflow.db").exists():
            with _translated(refuse=False), self._one_at_a_time():
                self._client()

    def _client(self) -> Any:
        if self._connected is None:
            self._connected = self._connect()
        return self._connected

    def _connect(self) -> Any:
        for name, value in CLIENT_LIMITS.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", module=r"(mlflow|alembic|sqlalchemy)(\..*)?")
        from mlflow.tracking.client import MlflowClient

        for chatty in ("mlflow", "alembic", "sqlalchemy"):
            logging.getLogger(chatty).setLevel(logging.CRITICAL)
        if self._is_embedded:
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            # Whoever opens an empty database creates its tables: the caller holds the lock.
            SqlAlchemyStore(self._uri, f"{_PROXIED}:/")
        return MlflowClient(tracking_uri=self._uri)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Keep the bridges of several containers from creating the same thing twice."""
        try:
            with exclusive(self._folder / ".lock", _LOCK_TIMEOUT_S):
                yield
        except TimeoutError as error:
            raise TrackerUnavailableError(str(error)) from None

    @contextmanager
    def _patient(self) -> Iterator[None]:
        """Allow an upload more time than a small request: a server may answer once it has stored the file."""
        name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
        before = os.environ.get(name)
        os.environ[name] = str(max(_UPLOAD_TIMEOUT_S, int(before or 0)))
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before

    def _experiment(self, project: str) -> str:
        name = self._environment.get("MLFLOW_EXPERIMENT_NAME") or project or "Default"
        if name not in self._experiments:
            client = self._client()
            found = client.get_experiment_by_name(name)
            if found is None:
                self._experiments[name] = client.create_experiment(name, self._artifact_location(name))
            elif found.lifecycle_stage != "active":
                raise TrackerUnavailableError(
                    f"the MLflow experiment {name!r} is deleted; restore it (mlflow experiments restore), "
                    "or name another with MLFLOW_EXPERIMENT_NAME"
                )
            else:
                self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _artifact_location(self, experiment: str) -> str | None:
        """Return where a new experiment keeps artifacts; None lets the server choose.

        In a database, a path would be true either in the container or on the host. The proxy's scheme is true
        in both: `track ui` and this tracker both look for it under `<runs>/mlflow/artifacts`.
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
        """Send parameters and tags; a parameter that a resume changed keeps its first value, and is named in a tag."""
        from mlflow.entities import Param, RunTag

        params = flat_params(run.params)
        changed = [
            f"{key}: {stored[key]} -> {value}"
            for key, value in params.items()
            if stored.get(key, value) != value
        ]
        tags = {key[:_KEY_LENGTH]: str(value)[:_TAG_LENGTH] for key, value in run.tags.items()}
        if changed:
            tags["starling.changed_on_resume"] = "; ".join(changed)[:_TAG_LENGTH]
        client = self._client()
        new = [Param(key, value) for key, value in params.items() if key not in stored]
        for batch in (new[at : at + _PARAMS_PER_REQUEST] for at in range(0, len(new), _PARAMS_PER_REQUEST)):
            client.log_batch(run_id, params=batch)
        if tags:
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _copy(self, source: Path, target: Path) -> None:
        root = (self._folder / "artifacts").resolve()
        if not target.resolve().is_relative_to(root):
            raise TrackerRejectedError(f"{target} is outside {root}")
        with open(source, "rb") as file:
            write_atomic(target, lambda out: shutil.copyfileobj(file, out))


def database_uri(runs: Path) -> str:
    """Return the address of the embedded database."""
    return f"sqlite:///{runs.absolute() / 'mlflow' / 'mlflow.db'}"


def metric_key(name: str) -> str:
    """Return `name` as MLflow takes it: `precision(B)` -> `precision_B`, `mAP_0.5:0.95` as it is."""
    return _shortened(re.sub(r"[^/\w.\- :]+", "_", name).strip("_") or "_")


def flat_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested parameters as flat text (`hyp.lr0`), names and values cut to what MLflow takes."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flat_params(value, f"{name}."))
        else:
            text = str(value)
            flat[metric_key(name)] = text if len(text) <= _VALUE_LENGTH else text[: _VALUE_LENGTH - 1] + "…"
    return flat


def without_credentials(text: str) -> str:
    """Return `text` with the `user:password@` of every address in it left out."""
    return re.sub(r"//[^/@\s]+@", "//", text)


def _shortened(key: str) -> str:
    """Cut a long name, with a digest in place of the rest, so that two long names stay two."""
    if len(key) <= _KEY_LENGTH:
        return key
    return f"{key[: _KEY_LENGTH - 9]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


@contextmanager
def _translated(*, refuse: bool = True) -> Iterator[None]:
    """Turn what MLflow's client raises into the two errors of the protocol.

    `refuse=False` treats a refusal like an outage: without its run, every later event would be lost.
    """
    try:
        yield
    except (TrackerRejectedError, TrackerUnavailableError):
        raise
    except Exception as error:
        # Anything: the client passes on whatever its parsers raise when a server answers nonsense.
        lines = without_credentials(str(error)).strip().splitlines() or [""]
        message = f"MLflow: {type(error).__name__}: {lines[0][:300]}"
        if refuse and getattr(error, "error_code", "") in _REFUSALS:
            raise TrackerRejectedError(message) from error
        raise TrackerUnavailableError(message) from error
