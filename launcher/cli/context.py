"""Shared by the commands: the options that say where replicas run, and the engine that they select."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from launcher.console import say
from starling.core.errors import UsageError

if TYPE_CHECKING:
    from launcher.engines.base import Engine, ReplicaState
    from launcher.hosts.host import Host


@dataclass(frozen=True, slots=True)
class Target:
    """Where the replicas of a command run."""

    engine: str
    """`docker`, `podman` or `local`."""
    host: str | None
    """The address from `--host` or the file of settings; None: DOCKER_HOST, the Docker context, or this machine."""
    runs: Path
    host_is_typed: bool = False
    """Whether the command line gives the address."""

    def find_host(self) -> Host:
        """Return the machine, connected if it is remote; raises EngineError if the machine cannot be reached."""
        from launcher.engines.opening import find_host

        return find_host(self.engine, self.host)

    def open_engine(self, host: Host | None = None) -> Engine:
        """Return the engine of `host` or of the target's machine; raises EngineError if the engine does not answer."""
        from launcher.engines.opening import open_engine

        if self.engine == "local" and self.host_is_typed:
            raise UsageError("--host: processes run on this machine only; leave it out with --engine local")
        return open_engine(self.engine, host or self.find_host(), self.runs)


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where replicas run; `command` receives them as a Target, its first argument."""
    runs_option = click.option(
        "--runs",
        type=click.Path(path_type=Path),
        default=Path("runs"),
        envvar="STARLING_RUNS",
        show_default=True,
        help="The shared folder that replicas write.",
    )
    engine_option = click.option(
        "--engine",
        type=click.Choice(["docker", "podman", "local"]),
        default="docker",
        envvar="STARLING_ENGINE",
        show_default=True,
        help="Containers of Docker or Podman, or processes of this machine.",
    )
    host_option = click.option(
        "--host",
        metavar="URL",
        envvar="DOCKER_HOST",
        callback=_given_address,
        help="The machine: ssh://user@machine, tcp://… [$DOCKER_HOST, the Docker context, this one].",
    )

    @functools.wraps(command)
    def call(*arguments: Any, engine: str, host: str | None, runs: Path, **options: Any) -> Any:
        source = click.get_current_context().get_parameter_source("host")
        target = Target(engine, host, runs, host_is_typed=source is ParameterSource.COMMANDLINE)
        from starling.core.log_lines import lines_to  # `--help` does without logging

        with lines_to(say):
            return command(target, *arguments, **options)

    return engine_option(host_option(runs_option(call)))


def _given_address(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Return the address if the command line or the file of settings gives it; None if the environment does.

    DOCKER_CONTEXT, like other variables, wins over the file.
    """
    source = ctx.get_parameter_source(param.name or "")
    overruled = source is ParameterSource.DEFAULT_MAP and bool(os.environ.get("DOCKER_CONTEXT"))
    if not value or source is ParameterSource.ENVIRONMENT or overruled:
        return None
    from launcher.hosts.address import check_address

    check_address(value)
    return value


def count_words(states: Sequence[ReplicaState]) -> str:
    """Return the number of replicas in words: `1 replica`, `2 replicas`."""
    return f"{len(states)} replica{'s' * (len(states) != 1)}"
