"""What the commands share: the options that say where replicas live, the engine they mean, and how a command speaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from starling.core.errors import UsageError

if TYPE_CHECKING:
    from launcher.engines.base import Engine, ReplicaState


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where replicas live."""
    runs = click.option(
        "--runs",
        type=click.Path(path_type=Path),
        default=Path("runs"),
        envvar="STARLING_RUNS",
        show_default=True,
        help="The shared folder that replicas write.",
    )
    engine = click.option(
        "--engine",
        type=click.Choice(["docker", "podman", "local"]),
        default="docker",
        envvar="STARLING_ENGINE",
        show_default=True,
        help="Containers of Docker or Podman, or processes of this machine.",
    )
    host = click.option(
        "--host",
        metavar="URL",
        envvar="DOCKER_HOST",
        expose_value=False,
        callback=_choose_host,
        help="The machine: ssh://user@box, tcp://… [$DOCKER_HOST, the Docker context, this one].",
    )
    return engine(host(runs(command)))


def _choose_host(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    said_elsewhere = bool(os.environ.get("DOCKER_CONTEXT")) and _from_file(ctx, param)
    if value and ctx.get_parameter_source("host") is not ParameterSource.ENVIRONMENT and not said_elsewhere:
        from launcher.hosts.address import choose_host

        choose_host(value)


def _from_file(ctx: click.Context, param: click.Parameter) -> bool:
    return ctx.get_parameter_source(param.name or "") is ParameterSource.DEFAULT_MAP


def open_engine(name: str, runs: Path) -> Engine:
    """Return the engine that `--engine` names; raises EngineError when it does not answer."""
    from launcher.engines import opening

    if name == "local":
        _refuse_host()
    return opening.open_engine(name, runs)


def _refuse_host() -> None:
    ctx = click.get_current_context(silent=True)
    if ctx is not None and ctx.get_parameter_source("host") is ParameterSource.COMMANDLINE:
        raise UsageError("--host: processes run on this machine only; leave it out with --engine local")


def count_words(states: Sequence[ReplicaState]) -> str:
    """Return `1 replica`, or so many."""
    return f"{len(states)} replica{'s' * (len(states) != 1)}"
