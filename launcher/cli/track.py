"""`launcher track`: start, stop, show, back up and restore the tracking servers of the compose file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_compose_file = click.option(
    "--compose-file",
    type=click.Path(path_type=Path),
    envvar="STARLING_COMPOSE_FILE",
    help="The project's docker-compose.yml [beside the launcher, or in this folder].",
)
_profiles = click.option(
    "--profile", "profiles", multiple=True, metavar="NAME", help="clearml-server: a ClearML server as well."
)
_limit = click.option(
    "--limit",
    default=300.0,
    show_default=True,
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    help="Wait no longer for healthy servers.",
)
_yes = click.option("--yes", is_flag=True, help="Do not ask.")


def _on_compose(command: Callable[..., Any]) -> Callable[..., Any]:
    return _compose_file(_profiles(command))


@click.group(epilog="Settings of the servers: .env beside the compose file; .env.example lists them.")
def track() -> None:
    """Run the tracking servers: MLflow on PostgreSQL, and a ClearML agent."""


@track.command()
@click.option("--build", is_flag=True, help="Build, or fetch, images that are missing.")
@_limit
@_on_compose
def up(compose_file: Path | None, profiles: tuple[str, ...], build: bool, limit: float) -> None:
    """Start the servers, wait until they are healthy, and print their addresses. Running servers stay unchanged."""
    from launcher.servers import track as servers

    servers.bring_up(servers.open_compose(compose_file, profiles), build=build, limit_s=limit)


@track.command()
@click.option("--volumes", is_flag=True, help="Also remove all stored data: runs, artifacts, passwords.")
@_yes
@_on_compose
def down(compose_file: Path | None, profiles: tuple[str, ...], volumes: bool, yes: bool) -> None:
    """Stop and remove the servers of this project, and nothing else. The stored data stays."""
    from launcher.servers import track as servers

    servers.take_down(
        servers.open_compose(compose_file, profiles or ("clearml-server",)), volumes=volumes, yes=yes
    )


@track.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def status(as_json: bool) -> None:
    """Show the servers and their addresses. Exits 0 when all are healthy; 1 when one is not, or no server runs."""
    from launcher.servers.track import show_status

    sys.exit(show_status(as_json=as_json))


@track.command()
@click.argument("user", type=click.Choice(["admin", "trainer", "clearml"]), default="admin")
def password(user: str) -> None:
    """Print the password of MLflow's user admin (the default) or trainer, or of ClearML's admin."""
    from launcher.servers.track import show_password

    show_password(user)


@track.command()
@_on_compose
@click.argument("file", type=click.Path(path_type=Path))
def backup(compose_file: Path | None, profiles: tuple[str, ...], file: Path) -> None:
    """Write the databases and the artifacts into FILE, a tar, while the servers run. FILE holds no password."""
    from launcher.servers.backup import back_up
    from launcher.servers.track import open_compose

    back_up(open_compose(compose_file, profiles), file)


@track.command()
@_yes
@_limit
@_on_compose
@click.argument("file", type=click.Path(path_type=Path))
def restore(
    compose_file: Path | None, profiles: tuple[str, ...], file: Path, yes: bool, limit: float
) -> None:
    """Replace the servers' stored data with the contents of FILE, and start the servers.

    If FILE is damaged or does not load, nothing changes.
    """
    from launcher.servers.restore import restore as put_back
    from launcher.servers.track import open_compose

    put_back(open_compose(compose_file, profiles), file, yes=yes, limit_s=limit)
