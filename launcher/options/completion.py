"""Types of click parameters with shell completion: names of replicas and fleets, and training arguments."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

ANSWER_S = 1.0
"""The longest wait for suggestions."""


class ReplicaName(click.types.StringParamType):
    """A replica's name, or a fleet's as project/name; the command checks whether it exists."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Suggest names that begin with `incomplete` and are not typed yet; no names after an error."""
        from click.shell_completion import CompletionItem

        typed: Sequence[str] = ctx.params.get(param.name or "") or ()
        return [
            CompletionItem(name)
            for name in dict.fromkeys(_names_in_time(ctx))
            if name.startswith(incomplete) and name not in typed
        ]


def _names_in_time(ctx: click.Context) -> list[str]:
    found: list[str] = []
    # A daemon thread with a time limit: a hung engine must not block the shell.
    asking = threading.Thread(target=lambda: found.extend(_names(ctx)), daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    return found


def _names(ctx: click.Context) -> list[str]:
    from launcher.engines.opening import find_host, open_engine
    from launcher.hosts.address import is_behind_ssh
    from starling.core.errors import StarlingError

    engine, given = ctx.params.get("engine") or "docker", ctx.params.get("host")
    try:
        if engine == "docker" and is_behind_ssh(given):
            return []  # an ssh connection takes too long for completion, and may ask for a password
        states = open_engine(engine, find_host(engine, given), ctx.params.get("runs") or Path("runs")).list()
    except StarlingError:
        return []
    return [state.name for state in states] + [state.fleet for state in states]


class TrainingWord(click.types.UnprocessedParamType):
    """A word of the training arguments; the suggestions come from the trainer's declared settings."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Suggest flags of `train.py`, a flag's choices, or names of files."""
        from click.shell_completion import CompletionItem

        from starling.core.settings.completion import offers
        from starling.core.settings.train import COMMAND

        given = offers(COMMAND.parser(), ctx.params.get(param.name or "") or (), incomplete)
        if given.files:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(word, help=text) for word, text in given.words]
