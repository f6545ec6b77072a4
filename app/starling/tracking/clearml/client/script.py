"""The code behind a task, for an agent: repository, commit, changes and packages."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from typing import Any

from starling.core import package
from starling.core.redaction import Redaction

ROOT = package.PARENT.parent
"""The checkout, if the code runs from one."""
ENTRY = "app/train.py"
DISTRIBUTION = "starling-detect"
"""Name of this project for pip, which is left out of the requirements."""
MAX_DIFF_BYTES = 400_000
_GIT_S = 10.0

STANDALONE = '''\
"""Train as this task's Args and Hyp say; change them on a clone, and enqueue it.

The code is the package `starling` of the image that the agent runs in (CLEARML_AGENT_BASE in .env.example).
"""

import sys

try:
    from starling.cli.train import main
except ImportError as error:
    sys.exit(f"{error}: this agent's Python does not hold the trainer; build its image on the trainer's (docs/clearml.md)")
sys.exit(main([]))
'''
"""Script for an agent if the code comes from no repository that the agent can clone, for example from an image."""


def describe_script(commit: str = "", diff: str = "") -> dict[str, Any]:
    """Return the `script` part of a task, for `tasks.create`.

    `commit` and `diff` are what a run recorded at its start, maybe long ago; without them, the present code is used.
    """
    requirements = {"requirements": {"pip": _packages()}, "binary": f"python{platform.python_version()}"}
    repository = _address(_git("remote", "get-url", "origin"))
    if not repository:
        return {
            **requirements, "repository": "", "branch": "", "version_num": "", "tag": "",
            "entry_point": "train.py", "working_dir": ".", "diff": STANDALONE,
        }  # fmt: skip
    head = _git("rev-parse", "HEAD")
    branch = _git("branch", "--show-current") if commit in {"", head} else ""
    return {
        **requirements, "repository": repository, "branch": branch, "tag": "", "version_num": commit or head,
        "entry_point": ENTRY, "working_dir": ".", "diff": _applicable(diff if commit else _diff()),
    }  # fmt: skip


@functools.cache
def _packages() -> str:
    """Return the installed packages in the format of a requirements file."""
    found = {
        (
            distribution.metadata["Name"] or ""
        ).lower(): f"{distribution.metadata['Name']} == {distribution.version}"
        for distribution in importlib.metadata.distributions()
        if distribution.metadata["Name"]
    }
    found.pop(DISTRIBUTION, None)
    return "\n".join(found[name] for name in sorted(found))


def _diff() -> str:
    """Return the uncommitted changes. Secrets in them are redacted, even if the diff then no longer applies."""
    diff = _git("diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD")
    return f"{Redaction()(diff)}\n" if diff else ""


def _applicable(diff: str) -> str:
    """Return a diff that a page can show; a longer one is left out, because a truncated diff would not apply."""
    return diff if len(diff.encode()) <= MAX_DIFF_BYTES else ""


def _git(*words: str) -> str:
    """Return git's output about the checkout that the code runs from; '' without git, or outside a checkout."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            timeout=_GIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip("\n") if done.returncode == 0 else ""


def _address(url: str) -> str:
    """Return an address that an agent can clone from, without credentials; '' for a path of this machine."""
    url = url.strip()
    if not re.match(r"(https?|ssh|git)://|[\w.-]+@[\w.-]+:", url):
        return ""
    url = re.sub(r"^(https?://)[^/@\s]+@", r"\1", url)
    return re.sub(r"^(\w+://[^/@:\s]+):[^/@\s]*@", r"\1@", url)
