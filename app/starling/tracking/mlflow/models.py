"""MLflow's registry: a run's best weights as a model for `mlflow models serve`, and the model's promotion."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from starling.core import package
from starling.core.errors import StarlingError, UsageError, suggest
from starling.tracking.events import read_events
from starling.tracking.mlflow.names import TAG_LENGTH, metric_key
from starling.tracking.tracker import ModelFile, TrackerRejectedError

CANDIDATE, PRODUCTION = "candidate", "production"
DIGEST_TAG = "starling.weights"
_METRIC_TAG = "metric."
_EXPORT_S = 900
_PARAMETERS = {"confidence": 0.25, "iou": 0.45, "max_detections": 300}
"""Parameters of a request, and their defaults, as in `detect.py`."""
_SERVED = ("mlflow", "numpy", "onnxruntime", "opencv-python-headless", "pandas")
Upload = Callable[[Any, Path], None]
"""Takes a logged model and the folder with its files."""


class NotPromotedError(StarlingError):
    """A model does not pass the gate."""


def model_name(project: str) -> str:
    """Return a project's name in the form that the registry accepts."""
    return re.sub(r"[/:.\s]+", "-", project).strip("-") or "model"


def offer(client: Any, run: Any, model: ModelFile, upload: Upload) -> str:
    """Register weights as a new version of the project's model, with the alias `candidate`; return the version.

    Weights that are already registered are not registered again. `run` is MLflow's record of the run.
    Raises TrackerRejectedError if the weights cannot be exported.
    """
    name = model_name(client.get_experiment(run.info.experiment_id).name)
    with open(model.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    run_id = run.info.run_id
    known = [
        stored
        for stored in client.search_model_versions(f"name='{name}'")
        if stored.run_id == run_id and stored.tags.get(DIGEST_TAG) == digest
    ]
    number = str(known[0].version) if known else _register(client, run, model, name, digest, upload)
    client.set_registered_model_alias(name, CANDIDATE, number)
    return number


def _register(client: Any, run: Any, model: ModelFile, name: str, digest: str, upload: Upload) -> str:
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    run_id, values = run.info.run_id, {metric_key(key): value for key, value in model.values.items()}
    with tempfile.TemporaryDirectory() as temporary:
        packed = _pack(model, run.data.params.get("imgsz", "640"), Path(temporary))
        logged = client.create_logged_model(
            run.info.experiment_id, name=model.name, source_run_id=run_id, tags={DIGEST_TAG: digest}
        )
        upload(logged, packed)
    client.finalize_logged_model(logged.model_id, "READY")
    # The points that the run already has, sent again with the model's id: they add nothing to the run.
    points = [
        Metric(point.key, point.value, point.timestamp, point.step, model_id=logged.model_id, run_id=run_id)
        for key in values
        for point in client.get_metric_history(run_id, key)
        if point.step == model.step
    ]
    if points:
        client.log_batch(run_id, metrics=points)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {DIGEST_TAG: digest, "starling.epoch": str(model.step)}
    tags |= {f"{_METRIC_TAG}{key}": repr(value) for key, value in values.items()}
    created = client.create_model_version(
        name,
        logged.artifact_location,
        run_id=run_id,
        tags=tags,
        model_id=logged.model_id,
        description=f"{model.name} of run {run.info.run_name}, epoch {model.step + 1}"[:TAG_LENGTH],
    )
    return str(created.version)


def _pack(model: ModelFile, image_size: str, folder: Path) -> Path:
    """Return a folder with the model in MLflow's format: ONNX from the project's exporter, and the serving code."""
    weights = folder / "model.pt"
    shutil.copyfile(model.path, weights)
    onnx = _export(weights, image_size)
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    params = [
        ParamSpec(name, DataType.long if isinstance(value, int) else DataType.double, value)
        for name, value in _PARAMETERS.items()
    ]
    signature = ModelSignature(inputs=Schema([ColSpec(DataType.string, "image")]), params=ParamSchema(params))
    packed = folder / "packed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow would prefer type hints, but the signature serves
        mlflow.pyfunc.save_model(
            str(packed),
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"onnx": str(onnx)},
            signature=signature,
            pip_requirements=[f"{package}=={version(package)}" for package in _SERVED],
        )
    return packed


def _export(weights: Path, image_size: str) -> Path:
    """Return the ONNX file of weights, exported in a separate process because the exporter needs torch."""
    command = package.command("export", "--weights", str(weights), "--include", "onnx")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package.python_path({})}
    try:
        ended = subprocess.run(
            [*command, "--img", image_size, "--device", "cpu"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_EXPORT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TrackerRejectedError(f"{weights.name}: the export to ONNX took over {_EXPORT_S} s") from None
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        raise TrackerRejectedError(
            f"{weights.name}: no model is registered, the export to ONNX failed: {last}"
        )
    return weights.with_suffix(".onnx")


def promote(
    client: Any,
    run_id: str,
    *,
    metric: str,
    at_least: float,
    better_than: str | None = None,
    alias: str = PRODUCTION,
) -> tuple[str, str, float]:
    """Give a run's model the alias if it passes the gate; return its name, its version and its value of the metric.

    Raises NotPromotedError with both figures if it does not pass, UsageError without such a model or metric.
    """
    found = client.search_model_versions(f"run_id='{run_id}'")
    if not found:
        raise UsageError(
            f"run {run_id}: no model of this run is registered; a finished run registers one if the setting `register` "
            "is True (starling track sync DIR sends unsent events)"
        )
    newest = max(found, key=lambda stored: int(stored.version))
    reached = _reached(newest, metric)
    if not reached >= at_least:
        raise NotPromotedError(
            f"{newest.name} version {newest.version} is not promoted: {metric} {reached:g} is below {at_least:g}"
        )
    if better_than:
        aliases = client.get_registered_model(newest.name).aliases
        if better_than in aliases:
            other = client.get_model_version_by_alias(newest.name, better_than)
            standing = _reached(other, metric)
            if other.version != newest.version and not reached > standing:
                raise NotPromotedError(
                    f"{newest.name} version {newest.version} is not promoted: {metric} {reached:g} is not better than "
                    f"{better_than}'s {standing:g} (version {other.version})"
                )
    client.set_registered_model_alias(newest.name, alias, newest.version)
    return str(newest.name), str(newest.version), reached


def _reached(stored: Any, metric: str) -> float:
    """Return a version's value of a metric, named by its full name or its last part: `mAP_0.5:0.95`."""
    values = {
        key.removeprefix(_METRIC_TAG): value
        for key, value in stored.tags.items()
        if key.startswith(_METRIC_TAG)
    }
    wanted = metric_key(metric)
    named = [key for key in values if key == wanted] or [
        key for key in values if key.rpartition("/")[2] == wanted
    ]
    if len(named) != 1:
        hint = suggest(wanted, values) or suggest(f"metrics/{wanted}", values)
        raise UsageError(
            f"--metric {metric}: version {stored.version} of {stored.name} has no such metric{hint}; "
            f"known: {', '.join(sorted(values)) or 'none'}"
        )
    return float(values[named[0]])


def run_uuid_of(directory: Path) -> str:
    """Return the UUID of the run in a run directory; raises UsageError if the directory has no event log."""
    logs = [directory / "events.jsonl", *sorted(directory.glob("workers/*/events.jsonl"))]
    for log in logs:
        events, _ = read_events(log)
        started = next((event.run for event in events if event.name == "run_start"), None)
        if started:
            return started
    raise UsageError(
        f"{directory}: holds no events.jsonl with a run; give a run directory, or MLflow's run id"
    )
