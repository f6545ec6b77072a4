"""Where a run comes from, as ClearML's page shows it: as it was when the run began, which may be long before it is sent."""

from __future__ import annotations

import platform
from typing import Any

from starling.core.files.safe_open import read_file
from starling.outputs.run_dir import RunDir
from starling.tracking.clearml.client.machine import describe_machine
from starling.tracking.clearml.client.script import describe_script
from starling.tracking.tracker import Run


def code_of(run: Run) -> dict[str, Any]:
    """Return the script of a run's task: of the code that it noted when it began, where it knew a commit."""
    commit, dirty = str(run.tags.get("git_commit", "")), run.tags.get("git_dirty") == "True"
    try:
        diff = read_file(RunDir(run.directory).diff).decode(errors="replace") if commit and dirty else ""
    except OSError:
        diff = ""
    return describe_script(commit, diff)


def machine_of(run: Run) -> dict[str, str]:
    """Return what is known of the machine that a run runs on: of another than this one, its name."""
    host = str(run.tags.get("host") or platform.node())
    return describe_machine() if host == platform.node() else {"hostname": host}
