"""The code behind a task: where an agent finds it, at which commit, with which changes, and with which packages."""

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
"""The checkout, where there is one."""
ENTRY = "app/train.py"
DISTRIBUTION = "starling-detect"
"""What pip calls this project: no requirement of itself."""
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
"""What an agent runs where the code came from no repository that it could clone: an image, say."""


def describe_script(commit: str = "", diff: str = "") -> dict[str, Any]:
    """Return the `script` part of a task, as `tasks.create` takes it.

    `commit` and `diff` are what a run noted when it began, which may be long ago; without them it is what is here now.
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
    """Return what is installed, in the form of a requirements file."""
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
    """Return what is changed and not committed. Secrets in it are blotted out, even where it does not apply then."""
    diff = _git("diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD")
    return f"{Redaction()(diff)}\n" if diff else ""


def _applicable(diff: str) -> str:
    """Return a diff that a page can show; one that would have to be cut would not apply, so it is left out."""
    return diff if len(diff.encode()) <= MAX_DIFF_BYTES else ""


def _git(*words: str) -> str:
    """Return what git says about the checkout that the code runs from; '' without git, or outside a checkout."""
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
    """Return an address an agent can clone from, without credentials; '' for a path of this machine."""
    url = url.strip()
    if not re.match(r"(https?|ssh|git)://|[\w.-]+@[\w.-]+:", url):
        return ""
    url = re.sub(r"^(https?://)[^/@\s]+@", r"\1", url)
    return re.sub(r"^(\w+://[^/@:\s]+):[^/@\s]*@", r"\1@", url)
