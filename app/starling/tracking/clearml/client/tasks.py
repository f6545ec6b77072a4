"""Tasks as trainings: arguments and hyperparameters can be edited on a clone, and read back into a command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from starling.config.hyp import Hyp
from starling.config.yaml_reader import write_yaml
from starling.core.errors import ConfigError, UsageError, suggest
from starling.core.plain_json import parse_json
from starling.core.settings.train import TrainConfig
from starling.tracking.clearml.client.api import Answer, ClearmlApi, ClearmlRefusedError
from starling.tracking.clearml.client.script import describe_script

ARGS, HYP, PROPERTIES = "Args", "Hyp", "properties"
"""Sections of a task's hyperparameters; ClearML's page shows `properties` as the user's own properties."""
MARK = "starling"
"""System tag of every task of this project."""
TASK_VARIABLE = "CLEARML_TASK_ID"
"""Set by an agent: the id of the task to run."""
OWN_TASK_VARIABLE = "STARLING_CLEARML_TASK"
"""Set by a trainer that takes its arguments from a task: the id of that task, which is the run's task. A training that
a user's script starts with arguments gets a new task, because the script's own task may go on."""
HYP_PREFIX = "hyp/"
_HERE = frozenset({"remote", "local_rank", "debug", "json"})
"""Settings of the present command that are no part of the training."""
_SIMPLE = {str, int, float, bool}


def uuid_tag(uuid: str) -> str:
    """Return the system tag that identifies the task of a run."""
    plain = re.sub(r"[^\w.-]", "", uuid)
    return f"{MARK}-{plain}"


def project_name(project: str) -> str:
    """Return a project's name in ClearML: `/` makes a subproject; parts of a local path are left out."""
    return (
        "/".join(part for part in project.removeprefix("runs/").split("/") if part not in ("", "."))
        or "train"
    )


def project_id(api: ClearmlApi, name: str) -> str:
    """Find or create a project by its full name, and return its id."""
    wanted = {"name": f"^{re.escape(name)}$", "only_fields": ["id", "name"], "order_by": ["created"]}
    found = api.call("projects.get_all", **wanted)["projects"]
    if found:
        return str(found[0]["id"])
    try:
        return str(api.call("projects.create", name=name, description="")["id"])
    except ClearmlRefusedError:  # another process has created it
        found = api.call("projects.get_all", **wanted)["projects"]
        if not found:
            raise
        return str(found[0]["id"])


def hyper_params(section: str, values: Mapping[str, Any]) -> dict[str, dict[str, dict[str, str]]]:
    """Return one section of hyperparameters in the form of the API."""
    return {
        section: {
            key: {"section": section, "name": key, "value": _text(value), "type": type(value).__name__}
            for key, value in values.items()
        }
    }


def sections_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's parameters as sections: `hyp/lr0` under Hyp, the others under Args."""
    arguments = {
        key: value for key, value in params.items() if not key.startswith(HYP_PREFIX) and key not in _HERE
    }
    hyp = {key.removeprefix(HYP_PREFIX): value for key, value in params.items() if key.startswith(HYP_PREFIX)}
    return {**hyper_params(ARGS, arguments), **(hyper_params(HYP, hyp) if hyp else {})}


def create_task(
    api: ClearmlApi,
    *,
    name: str,
    project: str,
    params: Mapping[str, Any],
    tags: Sequence[str] = (),
    kind: str = "training",
    parent: str | None = None,
    script: Mapping[str, Any] | None = None,
) -> str:
    """Create a task that an agent can run, with the present code unless `script` is given; return its id."""
    more = {"parent": parent} if parent else {}
    return str(
        api.call(
            "tasks.create", name=name, type=kind, project=project_id(api, project), system_tags=[MARK, *tags],
            hyperparams=sections_of(params), script=script or describe_script(), comment="", **more,
        )["id"]
    )  # fmt: skip


def get_task(api: ClearmlApi, task: str) -> Answer:
    """Return a task; raises UsageError for an unknown id."""
    try:
        return dict(api.call("tasks.get_by_id", task=task)["task"])
    except ClearmlRefusedError as error:
        if error.status == 401:
            raise
        raise UsageError(
            f"ClearML at {api.credentials.api_host} has no task {task}; copy the id from the task's page"
        ) from None


def task_page(api: ClearmlApi, task: Answer) -> str:
    """Return the address of a task's page."""
    return api.page(f"projects/{task.get('project') or '*'}/experiments/{task['id']}/output/log")


def queue_id(api: ClearmlApi, name: str) -> str:
    """Return the id of a queue; raises UsageError, with the names of the existing queues, for an unknown name."""
    found = api.call("queues.get_all", only_fields=["id", "name"])["queues"]
    queues = {str(item["name"]): str(item["id"]) for item in found}
    if name not in queues:
        known = ", ".join(sorted(queues)) or "none"
        raise UsageError(
            f"the ClearML server has no queue {name}{suggest(name, queues)}; it has: {known}. "
            f"An agent makes one: clearml-agent daemon --queue {name} --create-queue"
        )
    return queues[name]


def enqueue(api: ClearmlApi, task: str, queue: str) -> None:
    """Put a task into a queue, both given by id."""
    api.call("tasks.enqueue", task=task, queue=queue)


def section_of(task: Answer, section: str) -> dict[str, str]:
    """Return a section of a task's hyperparameters as text."""
    items = (task.get("hyperparams") or {}).get(section) or {}
    return {str(name): str(item.get("value", "")) for name, item in items.items()}


def command_line(task: Answer, folder: Path) -> list[str]:
    """Return the arguments of `train.py` that a task asks for; the task's Hyp is written to a file in `folder`.

    Arguments with default values are left out. Raises ConfigError for a wrong name or value.
    """
    words = _flags(section_of(task, ARGS))
    values = section_of(task, HYP)
    if values:
        where = f"task {task['id']}: Hyp"
        hyp = Hyp.from_mapping(
            {key: _number(f"{where}/{key}", value) for key, value in values.items()}, where
        )
        path = folder / "hyp.yaml"
        write_yaml(path, hyp.as_dict(), comment=f"Of the ClearML task {task['id']}")
        words += ["--hyp", str(path)]
    return words


def _flags(values: Mapping[str, str]) -> list[str]:
    default = TrainConfig()
    known = {field.name: getattr(default, field.name) for field in fields(TrainConfig)}
    words: list[str] = []
    for name, text in values.items():
        if name in _HERE:
            continue
        if name not in known:
            raise ConfigError(f"Args/{name}", text, f"no such argument{suggest(name, known)}; fix the task")
        value = _parsed(name, text, known[name])
        flag = f"--{name.replace('_', '-')}"
        if value == known[name]:
            continue
        if isinstance(value, bool):
            words += [flag] if value else []
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [f"{flag}={value}"]
    return words


def _parsed(name: str, text: str, default: Any) -> Any:
    """Convert the text of a task's argument to the type of its default."""
    if type(default) not in _SIMPLE:
        try:
            found = parse_json(text)
            return tuple(int(item) for item in (found if isinstance(found, list) else [found]))
        except (ValueError, TypeError, OverflowError):
            raise ConfigError(f"Args/{name}", text, "must be a list of numbers, as [0, 1]") from None
    if isinstance(default, bool):
        words = {"true": True, "1": True, "false": False, "0": False, "": False}
        if text.lower() not in words:
            raise ConfigError(f"Args/{name}", text, "must be True or False")
        return words[text.lower()]
    if isinstance(default, str):
        return text
    try:
        return type(default)(text)
    except ValueError:
        raise ConfigError(f"Args/{name}", text, "must be a number") from None


def _number(where: str, text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ConfigError(where, text, "must be a number") from None


def _text(value: Any) -> str:
    return (
        json.dumps(value) if isinstance(value, list | tuple | dict) else "" if value is None else str(value)
    )
