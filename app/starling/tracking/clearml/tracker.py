"""ClearML as a tracker: a run is a task that users can clone and edit, and that an agent can run again.

The tracker calls the API server itself, with bounded calls (`starling.tracking.clearml.client.api`). The SDK's
`Task.init` does not suffice: its threads do not report lost data, and without a server only SIGKILL ends them.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starling.core.files.regular import open_regular
from starling.core.files.safe_open import read_file
from starling.tracking.clearml import DATASET_SCHEME
from starling.tracking.clearml.client.api import ClearmlApi, ClearmlRefusedError, ClearmlUnavailableError
from starling.tracking.clearml.client.credentials import REMEDY, find_credentials
from starling.tracking.clearml.client.script import describe_script
from starling.tracking.clearml.client.tasks import (
    MARK,
    OWN_TASK_VARIABLE,
    PROPERTIES,
    create_task,
    hyper_params,
    project_name,
    sections_of,
    uuid_tag,
)
from starling.tracking.clearml.origin import code_of, machine_of
from starling.tracking.clearml.plots import confusion_plot, image_plot
from starling.tracking.lock import exclusive
from starling.tracking.tracker import (
    DatasetInput,
    ModelFile,
    Run,
    TrackerRejectedError,
    TrackerUnavailableError,
)

CONFUSION = "confusion_matrix.png"
"""File name of the confusion matrix; the JSON file beside it has the counts, which ClearML draws itself."""
_LOCK_TIMEOUT_S = 120.0
_MACHINE = ":monitor:machine"
_GPU = ":monitor:gpu"
"""Titles under which ClearML's page shows the values of its own monitor."""
_STATUSES = {"finished": "completed", "failed": "failed", "killed": "stopped", "pruned": "completed"}
_MESSAGE_LENGTH = 4000
_PREVIEW_BYTES = 8000
_TEXT = {".csv", ".yaml", ".json", ".txt", ".diff"}


@dataclass(frozen=True, slots=True)
class _TaskPlace:
    """A task's name, the id of its project, and the folder of its files."""

    name: str
    project: str
    folder: str


class ClearmlTracker:
    """Send runs to a ClearML server; see the `Tracker` protocol.

    If a trainer got its arguments from an agent's task, that task is its run, and the agent reports the console.
    """

    name = "clearml"

    def __init__(self, runs: Path, environment: Mapping[str, str]) -> None:
        credentials = find_credentials(environment)
        if credentials is None:
            raise TrackerUnavailableError(f"ClearML is not configured: {REMEDY}")
        self._lock = runs / ".cache" / "clearml.lock"
        self._agents_task = environment.get(OWN_TASK_VARIABLE, "")
        self._host = credentials.api_host
        self._api = ClearmlApi(credentials)
        self._places: dict[str, _TaskPlace] = {}
        self._epochs: dict[str, int] = {}

    def destination(self, log_dir: Path) -> str:
        """Name the API server."""
        return self._host

    def start_run(self, run: Run) -> str:
        """Find the task by the run's UUID, or create the task and its parent; reopen an ended task."""
        with _translated(refuse=False), self._one_at_a_time():
            parent = None
            if run.parent_uuid:
                parent = self._find_or_create(
                    run.parent_uuid, run.parent_name or run.project, run.project, {}, kind="optimizer"
                )
            elif self._agents_task:
                return self._attach(run)
            kind = "optimizer" if run.params.get("evolve") and not parent else "training"
            task = self._find_or_create(
                run.uuid,
                run.name,
                run.project,
                run.params,
                kind=kind,
                parent=parent,
                script=lambda: code_of(run),
            )
            self._describe(task, run)
        return task

    def log_metrics(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        """Record values: `train/box_loss` is the series box_loss of the plot train. The server keeps one per step.

        The server accepts finite numbers only; other values are reported in the console.
        """
        self._epochs[run_id] = step
        lost = {name: value for name, value in values.items() if not math.isfinite(value)}
        with _translated():
            self._api.send_events(
                self._event(
                    run_id, "training_stats_scalar", time, *_title_and_series(name), step, value=value
                )
                for name, value in values.items()
                if name not in lost
            )
        if lost:
            said = ", ".join(f"{name} {value}" for name, value in lost.items())
            self._say(run_id, f"epoch {step + 1}: not finite, so not plotted: {said}", time)

    def log_dataset(self, run_id: str, dataset: DatasetInput) -> None:
        """Show name, digest and counts as properties of the task, and the id of a ClearML dataset under Datasets."""
        values: dict[str, Any] = {
            f"{dataset.role} data": dataset.name,
            f"{dataset.role} digest": dataset.digest,
            f"{dataset.role} source": dataset.source,
            **{f"{dataset.role} {name}": f"{value:g}" for name, value in dataset.figures.items()},
        }
        sections = hyper_params(PROPERTIES, values)
        if dataset.source.startswith(DATASET_SCHEME):
            sections |= hyper_params("Datasets", {dataset.name: dataset.source.removeprefix(DATASET_SCHEME)})
        with _translated():
            self._edit_params(run_id, sections)
            if dataset.classes and dataset.role == "train":
                labels = {name: number for number, name in enumerate(dataset.classes)}
                self._api.call("tasks.edit", task=run_id, force=True, execution={"model_labels": labels})

    def log_image(self, run_id: str, path: Path, name: str, *, step: int, time: float) -> None:
        """Show an image among the debug samples at its epoch; each has its own file, so that none is overwritten."""
        with _translated():
            key = f"{self._place(run_id).folder}/metrics/{name}/{name}_{step:05d}{path.suffix}"
            url = self._api.upload(path, key)
            event = self._event(
                run_id, "training_debug_image", time, "pictures", name, step, url=url, key=key
            )
            self._api.send_events([event])

    def log_artifact(self, run_id: str, path: Path, folder: str, *, kind: str = "") -> None:
        """Store a file by its kind: images as plots, configurations also as editable text, others as artifacts."""
        if kind == "weights":
            return  # log_model stores weights as a model of the task
        counts = path.with_suffix(".json")
        heat_map = (
            confusion_plot(read_file(counts).decode())
            if path.name == CONFUSION and counts.is_file()
            else None
        )
        with _translated():
            key = f"{folder}/{path.name}" if folder else path.name
            url = self._api.upload(path, f"{self._place(run_id).folder}/artifacts/{key}")
            if heat_map is not None:
                self._plot(run_id, "confusion matrix", "counts", heat_map)
            if kind == "plot":
                self._plot(run_id, path.stem, "picture", image_plot(url, path))
                return
            if kind == "config":
                self._configure(run_id, path)
            artifact = _artifact(key, path, url)
            self._api.call("tasks.add_or_update_artifacts", task=run_id, force=True, artifacts=[artifact])

    def log_model(self, run_id: str, model: ModelFile) -> None:
        """Store weights as an output model of the task, with their metrics; a model of the same name is replaced."""
        with _translated():
            place = self._place(run_id)
            key = f"{self._place(run_id).folder}/models/{model.path.name}"
            name = f"{place.name} {model.name}"
            fields = {
                "uri": self._api.upload(model.path, key),
                "name": name,
                "comment": f"epoch {model.step + 1}",
                "framework": "PyTorch",
                "ready": True,
            }
            known = self._api.call("models.get_all", task=[run_id], name=f"^{re.escape(name)}$")["models"]
            if known:
                identity = str(known[0]["id"])
                self._api.call("models.edit", model=identity, **fields)
            else:
                identity = str(
                    self._api.call(
                        "models.create", task=run_id, project=place.project, system_tags=[MARK], **fields
                    )["id"]
                )
            metadata = [
                {"key": name, "type": "float", "value": f"{value:.5g}"}
                for name, value in model.values.items()
            ]
            if metadata:
                self._api.call("models.add_or_update_metadata", model=identity, metadata=metadata)
            self._api.call(
                "tasks.add_or_update_model", task=run_id, name=model.name, type="output", model=identity
            )

    def log_console(self, run_id: str, line: str, so_far: Callable[[], str], *, time: float) -> None:
        """Show a line of the console, unless an agent reports the console."""
        if run_id != self._agents_task:
            self._say(run_id, line, time)

    def log_system(self, run_id: str, values: Mapping[str, float], *, step: int, time: float) -> None:
        """Record a sample under the titles of ClearML's monitor, at the current epoch; an epoch's last sample stays.

        Seconds, which other trackers use as steps, would look like the task's iterations.
        """
        epoch = self._epochs.get(run_id, 0)
        with _translated():
            self._api.send_events(
                self._event(
                    run_id, "training_stats_scalar", time, _GPU if "gpu" in name else _MACHINE,
                    name.removeprefix("system/"), epoch, value=value,
                )
                for name, value in values.items()
                if math.isfinite(value)
            )  # fmt: skip

    def flush(self, *, last: bool = False) -> None:
        """Do nothing: each call has already sent its data."""

    def end_run(self, run_id: str, status: str, reason: str, *, time: float) -> None:
        """Set the end state of the task; a pruned candidate is a completed task with the tag `pruned`.

        An agent sets its task's state itself after the end of the process; seeing it earlier, it would end the process.
        """
        with _translated():
            self._edit_params(run_id, hyper_params(PROPERTIES, {"ended": f"{status}: {reason}".rstrip(": ")}))
            if run_id == self._agents_task:
                return
            if status == "pruned":
                task = self._api.call("tasks.get_by_id", task=run_id)["task"]
                tags = sorted({*(task.get("tags") or []), "pruned"})
                self._api.call("tasks.edit", task=run_id, force=True, tags=tags)
            self._api.call(
                f"tasks.{_STATUSES[status]}", task=run_id, force=True, status_reason=reason[:_MESSAGE_LENGTH],
                status_message=reason[:_MESSAGE_LENGTH],
            )  # fmt: skip

    def close(self) -> None:
        """Close connections."""
        self._api.close()

    def _find_or_create(
        self,
        uuid: str,
        name: str,
        project: str,
        params: Mapping[str, Any],
        *,
        kind: str,
        parent: str | None = None,
        script: Callable[[], Mapping[str, Any]] = describe_script,
    ) -> str:
        tag = uuid_tag(uuid)
        found = self._api.call(
            # A clone has the tags of its original: the oldest task is the original.
            "tasks.get_all", system_tags=[tag], order_by=["created"], page=0, page_size=1, only_fields=["id", "status"],
        )["tasks"]  # fmt: skip
        if found:
            task = str(found[0]["id"])
        else:
            task = create_task(
                self._api,
                name=name,
                project=project_name(project),
                params=params,
                tags=[tag],
                kind=kind,
                parent=parent,
                script=script(),
            )
        if not found or found[0]["status"] != "in_progress":
            self._api.call("tasks.started", task=task, force=True)
        return task

    def _attach(self, run: Run) -> str:
        """Make the agent's task the task of the run, so that the run's UUID finds it from now on."""
        task = self._api.call("tasks.get_by_id", task=self._agents_task)["task"]
        others = [tag for tag in task.get("system_tags") or [] if not tag.startswith(f"{MARK}-")]
        self._api.call(
            "tasks.edit",
            task=self._agents_task,
            force=True,
            system_tags=[*sorted({*others, MARK}), uuid_tag(run.uuid)],
        )
        if task["status"] != "in_progress":
            self._api.call("tasks.started", task=self._agents_task, force=True)
        self._describe(self._agents_task, run)
        return self._agents_task

    def _describe(self, task: str, run: Run) -> None:
        """Send arguments and hyperparameters, tags as properties, and the machine."""
        sections = sections_of(run.params) if run.params else {}
        self._edit_params(task, {**sections, **hyper_params(PROPERTIES, {"run": run.uuid, **run.tags})})
        self._api.call("tasks.edit", task=task, force=True, runtime=machine_of(run))

    def _edit_params(self, task: str, sections: Mapping[str, Mapping[str, Mapping[str, str]]]) -> None:
        items = [item for section in sections.values() for item in section.values()]
        self._api.call("tasks.edit_hyper_params", task=task, force=True, hyperparams=items)

    def _configure(self, task: str, path: Path) -> None:
        item = {
            "name": path.stem,
            "type": "yaml",
            "value": read_file(path).decode(errors="replace"),
            "description": path.name,
        }
        self._api.call("tasks.edit_configuration", task=task, force=True, configuration=[item])

    def _plot(self, task: str, title: str, series: str, plot: Mapping[str, Any]) -> None:
        # Plots of the whole run have no epoch, and a resumed run replaces them.
        self._api.send_events([self._event(task, "plot", None, title, series, 0, plot_str=json.dumps(plot))])

    def _say(self, task: str, text: str, time: float) -> None:
        event = {"type": "log", "task": task, "level": "info", "worker": platform.node(), "msg": text}
        with _translated():
            self._api.send_events([{**event, "timestamp": int(time * 1000)}])

    def _event(
        self, task: str, kind: str, time: float | None, metric: str, variant: str, step: int, **more: Any
    ) -> dict[str, Any]:
        stamp = {} if time is None else {"timestamp": int(time * 1000)}
        return {
            "type": kind,
            "task": task,
            "metric": metric,
            "variant": variant,
            "iter": step,
            **stamp,
            **more,
        }

    def _place(self, run_id: str) -> _TaskPlace:
        """Return a task's name and the folder of its files: `project/name.id`, as in ClearML's SDK."""
        if run_id not in self._places:
            task = self._api.call("tasks.get_by_id", task=run_id)["task"]
            name, project = str(task["name"]), str(task.get("project") or "")
            full = (
                self._api.call("projects.get_by_id", project=project)["project"]["name"] if project else MARK
            )
            folder = f"{full}/{re.sub(r'[^A-Za-z0-9_. -]', '_', name)}.{run_id}"
            self._places[run_id] = _TaskPlace(name, project, folder)
        return self._places[run_id]

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Keep the bridges of several containers from creating the same task twice."""
        try:
            with exclusive(self._lock, _LOCK_TIMEOUT_S):
                yield
        except TimeoutError as error:
            raise TrackerUnavailableError(str(error)) from None


def _title_and_series(name: str) -> tuple[str, str]:
    title, slash, series = name.partition("/")
    return (title, series) if slash else (name, name)


def _beginning(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(_PREVIEW_BYTES)


def _artifact(key: str, path: Path, url: str) -> dict[str, Any]:
    preview = _beginning(path).decode("utf-8", "replace") if path.suffix in _TEXT else ""
    return {
        "key": key,
        "type": "custom",
        "mode": "output",
        "uri": url,
        "content_size": path.stat().st_size,
        "type_data": {"preview": preview},
    }


@contextmanager
def _translated(*, refuse: bool = True) -> Iterator[None]:
    """Turn the errors of the client into the two errors of the protocol.

    `refuse=False` treats a refusal like an outage, and refused credentials are always treated so: events are kept.
    """
    try:
        yield
    except ClearmlRefusedError as error:
        if refuse and error.status not in {401, 403}:
            raise TrackerRejectedError(f"ClearML: {error}") from error
        raise TrackerUnavailableError(f"ClearML: {error}") from error
    except ClearmlUnavailableError as error:
        raise TrackerUnavailableError(f"ClearML: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        # Valid JSON in another form than a ClearML server sends.
        raise TrackerUnavailableError(f"ClearML: not an answer of a ClearML server ({error!r})") from error
    except OSError as error:
        kind = TrackerRejectedError if refuse else TrackerUnavailableError
        raise kind(f"{error.filename}: {error.strerror or error}") from error
