"""Trainings that an agent runs: put them into a queue here, and read the agent's task there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import replace

from starling.config.hyp import Hyp
from starling.core.errors import UsageError
from starling.core.settings.train import TrainConfig
from starling.outputs.run_dir import runs_root
from starling.tracking.clearml.client.api import ClearmlApi
from starling.tracking.clearml.client.credentials import REMEDY, find_credentials
from starling.tracking.clearml.client.tasks import (
    HYP_PREFIX,
    OWN_TASK_VARIABLE,
    TASK_VARIABLE,
    command_line,
    create_task,
    enqueue,
    get_task,
    project_name,
    queue_id,
    task_page,
)

PATIENCE_S = 20.0
"""Seconds during which a command tries to reach an unreachable server."""


def connect(environment: Mapping[str, str] = os.environ) -> ClearmlApi:
    """Return the server that the environment names; raises UsageError if it names none."""
    credentials = find_credentials(environment)
    if credentials is None:
        raise UsageError(f"ClearML is not configured: {REMEDY}")
    return ClearmlApi(credentials, patience_s=PATIENCE_S)


def enqueue_training(config: TrainConfig, hyp: Hyp) -> None:
    """Make a task of the command, put it into the queue `--remote` names, and say where it can be watched.

    The agent resolves paths in the arguments, so the paths must be valid on the agent's machine.
    """
    queue, config = config.remote, replace(config, remote="")
    params = {**config.as_dict(), **{f"{HYP_PREFIX}{key}": value for key, value in hyp.as_dict().items()}}
    api = connect()
    queue = queue_id(api, queue)  # found before the task is created: a wrong name leaves nothing behind
    kind = "optimizer" if config.evolve else "training"
    task = create_task(
        api, name=config.run_name, project=project_name(config.run_project), params=params, kind=kind
    )
    enqueue(api, task, queue)
    page = task_page(api, get_task(api, task))
    if config.json:
        print(json.dumps({"task": task, "page": page}), flush=True)
    else:
        print(
            f"task {task} is queued; an agent runs it, and what is changed on its page before is taken: {page}"
        )


def arguments_of_task(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Return the command line that the agent's task asks for, and record the task in `environment` as the run's task.

    The task's hyperparameters are written to a file below the runs folder.
    """
    api = connect(environment)
    task = get_task(api, environment[TASK_VARIABLE])
    words = command_line(task, runs_root(environment) / ".cache" / "clearml-tasks" / str(task["id"]))
    environment[OWN_TASK_VARIABLE] = str(task["id"])
    print(f"ClearML task {task['id']}: train.py {' '.join(words)}", flush=True)
    return words
