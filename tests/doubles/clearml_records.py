"""What the double of a ClearML server remembers, and what each endpoint does to it.

A double, not a ClearML server. It answers the endpoints that the real SDK (2.1.12) and the real agent (3.0.3) call in the
tests, keeps the server's rules that matter to a client (status changes, one scalar a metric, variant and iteration,
`order_by`, pages, projections), and refuses every other endpoint, so that nothing passes by being ignored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tests.doubles.clearml_queries import Body, Record, Selection, digest, new_id, now, projected

Endpoint = Callable[[Body], Record]

USER, COMPANY = "user-of-the-double", "company-of-the-double"
_STARTABLE = {"created", "queued", "stopped", "failed", "in_progress"}
_NESTED = ("script", "execution", "output", "runtime")
"""Parts of a task that an edit merges instead of replacing."""


class Refusal(Exception):
    """An answer that is an error: HTTP status, ClearML's subcode, message."""

    def __init__(self, status: int, subcode: int, message: str) -> None:
        super().__init__(message)
        self.status, self.subcode, self.message = status, subcode, message


class Records:
    """Tasks, models, queues, projects and events, in memory. Not thread-safe: the server holds a lock."""

    def __init__(self) -> None:
        self.tasks: dict[str, Record] = {}
        self.models: dict[str, Record] = {}
        self.queues: dict[str, Record] = {}
        self.projects: dict[str, Record] = {}
        self.workers: dict[str, Record] = {}
        self.events: dict[str, dict[Any, Record]] = {}
        """By task; scalars, plots and images by (type, metric, variant, iteration), so a repeated one replaces."""
        self._selection = Selection()

    def answer(self, endpoint: str, body: Body) -> Record:
        """Do what `service.action` asks for; raises Refusal."""
        handler = self._endpoints().get(endpoint)
        if handler is None:
            raise Refusal(400, 0, f"the double of a ClearML server does not know {endpoint}")
        return handler(body)

    # --- what tests ask for ---------------------------------------------------------------------------------------

    def task_named(self, name: str) -> Record:
        """Return the one task of this name."""
        [found] = [task for task in self.tasks.values() if task["name"] == name]
        return found

    def project_of(self, task: Record) -> str:
        """Return the name of a task's project."""
        return str(self.projects[task["project"]]["name"])

    def arguments(self, task: Record, section: str = "Args") -> dict[str, str]:
        """Return the hyperparameters of one section as text."""
        return {name: item["value"] for name, item in task["hyperparams"].get(section, {}).items()}

    def scalars(self, task_id: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
        """Return (metric, variant) -> its points, ordered by iteration."""
        found: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for event in self.of_type(task_id, "training_stats_scalar"):
            found.setdefault((event["metric"], event["variant"]), []).append((event["iter"], event["value"]))
        return {key: sorted(points) for key, points in found.items()}

    def of_type(self, task_id: str, kind: str) -> list[Record]:
        """Return the events of one type, oldest first."""
        return [event for event in self.events.get(task_id, {}).values() if event["type"] == kind]

    def console(self, task_id: str) -> str:
        """Return the console of a task."""
        return "\n".join(str(event["msg"]) for event in self.of_type(task_id, "log"))

    # --- endpoints ------------------------------------------------------------------------------------------------

    def _endpoints(self) -> dict[str, Endpoint]:
        return {
            **self._task_endpoints(),
            "events.add": lambda body: self.add_events([body]),
            "events.scalar_metrics_iter_histogram": self._histogram,
            "events.get_task_single_value_metrics": lambda body: {"tasks": []},
            "events.get_task_plots": lambda body: self._events_of(body, "plot", "plots"),
            "events.get_task_log": lambda body: self._events_of(body, "log", "events"),
            "projects.get_all": lambda body: self._select(self.projects, body, "projects"),
            "projects.get_all_ex": lambda body: self._select(self.projects, body, "projects"),
            "projects.create": lambda body: {"id": self._project(body["name"])["id"]},
            "projects.get_by_id": lambda body: {
                "project": _known(self.projects, body["project"], 401, "project")
            },
            "projects.update": lambda body: self._edit(self.projects, body["project"], body),
            "models.create": self._create_model,
            "models.get_by_id": lambda body: {"model": self._model(body)},
            "models.get_all": lambda body: self._select(self.models, body, "models"),
            "models.get_all_ex": lambda body: self._select(self.models, body, "models"),
            "models.edit": lambda body: self._edit(self.models, body["model"], body),
            "models.update": lambda body: self._edit(self.models, body["model"], body),
            "models.set_ready": lambda body: self._edit(self.models, body["model"], {"ready": True}),
            "models.add_or_update_metadata": self._add_metadata,
            "queues.get_all": lambda body: self._select(self.queues, body, "queues"),
            "queues.create": self._create_queue,
            "queues.get_by_id": lambda body: {"queue": self._queue(body)},
            "queues.get_default": lambda body: {
                "id": self._queue({"queue": "default"})["id"],
                "name": "default",
            },
            "queues.get_next_task": self._next_task,
            "workers.register": lambda body: (self.workers.update({body["worker"]: dict(body)}), {})[1],
            "workers.unregister": lambda body: (self.workers.pop(body["worker"], None), {})[1],
            "workers.status_report": lambda body: {},
            "workers.get_all": lambda body: {"workers": [{"id": name} for name in self.workers]},
            "workers.get_runtime_properties": lambda body: {"runtime_properties": []},
            "users.get_current_user": lambda body: {
                "user": {"id": USER, "name": "double", "company": {"id": COMPANY, "name": "double"}}
            },
            "server.info": lambda body: {"version": "2.0.0", "build": "double"},
            "organization.get_tags": lambda body: {"tags": []},
            "debug.ping": lambda body: {"msg": "double"},
        }

    def _task_endpoints(self) -> dict[str, Endpoint]:
        return {
            "tasks.create": self._create_task,
            "tasks.clone": self._clone_task,
            "tasks.get_by_id": lambda body: {"task": projected(self._task(body), body)},
            "tasks.get_all": lambda body: self._select(self.tasks, body, "tasks"),
            "tasks.get_all_ex": lambda body: self._select(self.tasks, body, "tasks"),
            "tasks.edit": self._edit_task,
            "tasks.update": lambda body: self._edit(self.tasks, body["task"], body),
            "tasks.started": self._started,
            "tasks.stop": self._status("stopped", {"in_progress", "queued", "created"}),
            "tasks.stopped": self._status("stopped", {"in_progress", "queued", "created"}),
            "tasks.completed": self._status("completed", {"in_progress", "stopped"}),
            "tasks.failed": self._status("failed", {"in_progress", "queued", "created", "stopped"}),
            "tasks.publish": self._status("published", {"completed", "stopped", "failed", "closed"}),
            "tasks.close": self._status("closed", {"in_progress", "stopped"}),
            "tasks.reset": self._status("created", {"stopped", "failed", "completed", "closed", "queued"}),
            "tasks.ping": lambda body: (self._task(body), {})[1],
            "tasks.enqueue": self._enqueue,
            "tasks.dequeue": self._dequeue,
            "tasks.delete": lambda body: {
                "deleted": self.tasks.pop(self._task(body)["id"], None) is not None
            },
            "tasks.archive": self._archive,
            "tasks.edit_hyper_params": self._edit_hyper_params,
            "tasks.delete_hyper_params": self._delete_hyper_params,
            "tasks.get_hyper_params": lambda body: {
                "params": [
                    {"task": name, "hyperparams": _flat(self.tasks[name]["hyperparams"])}
                    for name in body["tasks"]
                ]
            },
            "tasks.edit_configuration": self._edit_configuration,
            "tasks.get_configurations": lambda body: {
                "configurations": [
                    {"task": name, "configuration": list(self.tasks[name]["configuration"].values())}
                    for name in body["tasks"]
                ]
            },
            "tasks.set_requirements": lambda body: self._edit(
                self.tasks, body["task"], {"script": {"requirements": body["requirements"]}}
            ),
            "tasks.add_or_update_artifacts": self._add_artifacts,
            "tasks.add_or_update_model": self._add_model,
        }

    # --- tasks ----------------------------------------------------------------------------------------------------

    def _task(self, body: Body) -> Record:
        return _known(self.tasks, body.get("task") or body.get("id"), 101, "task")

    def _create_task(self, body: Body) -> Record:
        for field in ("name", "type"):
            if not body.get(field):
                raise Refusal(400, 12, f"Validation error (missing {field})")
        task: Record = {
            "id": new_id(), "created": now(), "status": "created", "status_changed": now(), "user": USER,
            "company": COMPANY, "parent": None, "project": "", "tags": [], "system_tags": [], "hyperparams": {},
            "configuration": {}, "execution": {}, "script": {}, "output": {}, "runtime": {}, "container": {},
            "models": {"input": [], "output": []}, "last_metrics": {}, "last_iteration": 0,
        }  # fmt: skip
        self.tasks[task["id"]] = task
        self._merge(task, body)
        return {"id": task["id"]}

    def _clone_task(self, body: Body) -> Record:
        clone = copy.deepcopy(self._task(body))
        source = clone["id"]
        clone.update(
            id=new_id(), status="created", created=now(), status_changed=now(), last_metrics={}, output={},
            runtime={}, last_iteration=0, name=body.get("new_task_name") or f"{clone['name']} (clone)",
            parent=body.get("new_task_parent") or source, project=body.get("new_task_project") or clone["project"],
        )  # fmt: skip
        clone.pop("started", None)
        clone.pop("completed", None)
        clone["models"]["output"] = []
        clone["execution"] = {**clone["execution"], "artifacts": [], **body.get("execution_overrides", {})}
        if "new_task_tags" in body:
            clone["tags"] = list(body["new_task_tags"])
        self.tasks[clone["id"]] = clone
        return {"id": clone["id"]}

    def _edit_task(self, body: Body) -> Record:
        task = self._task(body)
        if task["status"] != "created" and not body.get("force"):
            raise Refusal(400, 110, f"Invalid task status: expected=created, status={task['status']}")
        self._merge(task, body)
        return {"updated": 1, "fields": {}}

    def _started(self, body: Body) -> Record:
        answer = self._status("in_progress", _STARTABLE)(body)
        task = self._task(body)
        task.setdefault("started", now())
        task.pop("completed", None)
        return {**answer, "started": 1}

    def _status(self, status: str, allowed: set[str]) -> Endpoint:
        def change(body: Body) -> Record:
            task = self._task(body)
            if task["status"] not in {status, *allowed} and not body.get("force"):
                raise Refusal(400, 110, f"Invalid task status: {task['status']} -> {status}")
            task.update(
                status=status, status_changed=now(), status_reason=body.get("status_reason", ""),
                status_message=body.get("status_message", ""), last_update=now(),
            )  # fmt: skip
            if status in {"completed", "failed", "stopped"}:
                task["completed"] = now()
            return {"updated": 1, "fields": {"status": status}}

        return change

    def _archive(self, body: Body) -> Record:
        for name in body.get("tasks", []):
            self.tasks[name]["system_tags"].append("archived")
        return {"archived": len(body.get("tasks", []))}

    def _edit_hyper_params(self, body: Body) -> Record:
        task = self._task(body)
        replaced = body.get("replace_hyperparams", "none")
        sections = {item.get("section", "Args") for item in body["hyperparams"]}
        if replaced == "all":
            task["hyperparams"] = {}
        elif replaced == "section":
            task["hyperparams"] = {
                name: items for name, items in task["hyperparams"].items() if name not in sections
            }
        for item in body["hyperparams"]:
            task["hyperparams"].setdefault(item.get("section", "Args"), {})[item["name"]] = dict(item)
        task["last_update"] = now()
        return {"updated": 1}

    def _delete_hyper_params(self, body: Body) -> Record:
        task = self._task(body)
        for item in body["hyperparams"]:
            task["hyperparams"].get(item.get("section", "Args"), {}).pop(item.get("name"), None)
        return {"deleted": 1}

    def _edit_configuration(self, body: Body) -> Record:
        task = self._task(body)
        if body.get("replace_configuration"):
            task["configuration"] = {}
        task["configuration"].update({item["name"]: dict(item) for item in body["configuration"]})
        return {"updated": 1}

    def _add_artifacts(self, body: Body) -> Record:
        kept = self._task(body)["execution"].setdefault("artifacts", [])
        for item in body["artifacts"]:
            key = (item["key"], item.get("mode", "output"))
            kept[:] = [old for old in kept if (old["key"], old.get("mode", "output")) != key] + [dict(item)]
        return {"updated": 1}

    def _add_model(self, body: Body) -> Record:
        kept = self._task(body)["models"][body["type"]]
        entry = {"name": body["name"], "model": body["model"]}
        kept[:] = [old for old in kept if old["name"] != body["name"]] + [entry]
        return {"updated": 1}

    # --- queues and models ----------------------------------------------------------------------------------------

    def _queue(self, body: Body) -> Record:
        wanted = body.get("queue") or body.get("queue_name")
        for queue in self.queues.values():
            if wanted in (queue["id"], queue["name"]):
                return queue
        raise Refusal(400, 701, f"Invalid queue id: id={wanted}")

    def _create_queue(self, body: Body) -> Record:
        if any(queue["name"] == body["name"] for queue in self.queues.values()):
            raise Refusal(400, 702, f"Queue with the same name already exists: {body['name']}")
        queue = {
            "id": new_id(),
            "name": body["name"],
            "created": now(),
            "entries": [],
            "tags": [],
            "system_tags": [],
        }
        self.queues[queue["id"]] = queue
        return {"id": queue["id"]}

    def _enqueue(self, body: Body) -> Record:
        task, queue = self._task(body), self._queue(body)
        if task["status"] not in {"created", "stopped", "failed"} and not body.get("force"):
            raise Refusal(400, 110, f"Invalid task status: {task['status']} -> queued")
        queue["entries"].append({"task": task["id"], "added": now()})
        task["status"] = "queued"
        task["execution"]["queue"] = queue["id"]
        return {"queued": 1, "updated": 1, "fields": {"status": "queued"}}

    def _dequeue(self, body: Body) -> Record:
        task = self._task(body)
        for queue in self.queues.values():
            queue["entries"] = [entry for entry in queue["entries"] if entry["task"] != task["id"]]
        task["status"] = "created"
        return {"dequeued": 1, "updated": 1}

    def _next_task(self, body: Body) -> Record:
        entries = self._queue(body)["entries"]
        return {"entry": entries.pop(0)} if entries else {}

    def _model(self, body: Body) -> Record:
        return _known(self.models, body.get("model") or body.get("id"), 201, "model")

    def _create_model(self, body: Body) -> Record:
        model: Record = {
            "id": body.get("id") or new_id(), "created": now(), "ready": False, "tags": [], "system_tags": [],
            "labels": {}, "design": {}, "user": USER, "company": COMPANY, "uri": "",
        }  # fmt: skip
        self.models[model["id"]] = model
        self._merge(model, body)
        return {"id": model["id"], "created": True}

    def _add_metadata(self, body: Body) -> Record:
        kept = self._model(body).setdefault("metadata", {})
        kept.update({item["key"]: dict(item) for item in body["metadata"]})
        return {"updated": 1}

    def _project(self, name: str) -> Record:
        """Return a project, made with its parents if it is new."""
        for project in self.projects.values():
            if project["name"] == name:
                return project
        above = name.rpartition("/")[0]
        parent = self._project(above)["id"] if above else None
        project = {
            "id": new_id(), "name": name, "basename": name.rpartition("/")[2], "parent": parent, "created": now(),
            "company": COMPANY, "tags": [], "system_tags": [],
        }  # fmt: skip
        self.projects[project["id"]] = project
        return project

    # --- events ---------------------------------------------------------------------------------------------------

    def add_events(self, events: Iterable[Body]) -> Record:
        """Take events; a scalar, plot or image of the same metric, variant and iteration replaces the one before."""
        count = 0
        for event in events:
            task = self.tasks.get(event.get("task", ""))
            if task is None:
                raise Refusal(400, 101, f"Invalid task id: id={event.get('task')}")
            kind = event["type"]
            key = (
                new_id()
                if kind == "log"
                else (kind, event["metric"], event.get("variant", ""), event["iter"])
            )
            self.events.setdefault(task["id"], {})[key] = dict(event)
            if kind == "training_stats_scalar":
                self._remember_last(task, event)
            count += 1
        return {"added": count, "errors": 0, "errors_info": {}}

    def _remember_last(self, task: Record, event: Body) -> None:
        metric, variant = digest(event["metric"]), digest(event.get("variant", ""))
        value = event["value"]
        known = (
            task["last_metrics"]
            .setdefault(metric, {})
            .setdefault(
                variant,
                {
                    "metric": event["metric"],
                    "variant": event.get("variant", ""),
                    "min_value": value,
                    "max_value": value,
                },
            )
        )
        known.update(
            value=value, iter=event["iter"],
            min_value=min(known["min_value"], value), max_value=max(known["max_value"], value),
        )  # fmt: skip
        task["last_iteration"] = max(task["last_iteration"], event["iter"])

    def _histogram(self, body: Body) -> Record:
        answer: Record = {}
        for (metric, variant), points in self.scalars(self._task(body)["id"]).items():
            x, y = [point[0] for point in points], [point[1] for point in points]
            answer.setdefault(metric, {})[variant] = {"name": variant, "x": x, "y": y}
        return answer

    def _events_of(self, body: Body, kind: str, key: str) -> Record:
        found = self.of_type(self._task(body)["id"], kind)
        return {key: found, "total": len(found), "returned": len(found), "scroll_id": None}

    # --- looking up and changing ----------------------------------------------------------------------------------

    def _select(self, store: Mapping[str, Record], body: Body, key: str) -> Record:
        return self._selection.page(store, body, key)

    def _edit(self, store: Mapping[str, Record], name: str, body: Body) -> Record:
        self._merge(_known(store, name, 101, "id"), body)
        return {"updated": 1, "fields": {}}

    def _merge(self, record: Record, body: Body) -> None:
        for field, value in body.items():
            if (
                field in {"model", "id", "force"}
                or (field == "task" and "models" in record)
                or (field == "project" and "basename" in record)
            ):
                continue
            if field in _NESTED and isinstance(value, Mapping) and isinstance(record.get(field), dict):
                record[field].update(value)
            else:
                record[field] = copy.deepcopy(value)
        record["last_update"] = now()


def _known(store: Mapping[str, Record], name: object, subcode: int, kind: str) -> Record:
    if name not in store:
        raise Refusal(400, subcode, f"Invalid {kind} id: id={name}, company={COMPANY}")
    return store[str(name)]


def _flat(sections: Mapping[str, Mapping[str, Record]]) -> list[Record]:
    return [item for section in sections.values() for item in section.values()]
