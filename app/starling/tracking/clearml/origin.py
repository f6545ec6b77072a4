"""Origin of a run for ClearML's page: code and machine at the start of the run, which may be long before it is sent."""

from __future__ import annotations

import platform
from typing import Any

from starling.core.files.safe_open import read_file
from starling.outputs.run_dir import RunDir
from starling.tracking.clearml.client.machine import describe_machine
from starling.tracking.clearml.client.script import describe_script
from starling.tracking.tracker import Run


def code_of(run: Run) -> dict[str, Any]:
    """Return the script of a run's task, with the commit and changes that the run recorded at its start."""
    commit, dirty = str(run.tags.get("git_commit", "")), run.tags.get("git_dirty") == "True"
    try:
        diff = read_file(RunDir(run.directory).diff).decode(errors="replace") if commit and dirty else ""
    except OSError:
        diff = ""
    return describe_script(commit, diff)


def machine_of(run: Run) -> dict[str, str]:
    """Return the description of the run's machine; for another machine than this one, only its name."""
    host = str(run.tags.get("host") or platform.node())
    return describe_machine() if host == platform.node() else {"hostname": host}
