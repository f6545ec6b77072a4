"""The `launcher` command. Arguments in, one call, an exit code out.

Everything but click is imported where it is needed, so that `--help` is quick.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from launcher.config_file import ConfiguredCommand, root_option
from launcher.engines.limits import STOP_GRACE_S
from launcher.errors import LauncherError, UsageError, disk_full
from starling.core.paths import at_home, impossible, lost_folder
from starling.core.version import VERSION
from starling.core.words import shown

if TYPE_CHECKING:
    from launcher.engines.base import Engine, ReplicaState

EXIT_CODES = """\b
Exit codes: 0 done; 1 `status` with no replica, or one that failed; 2 usage;
3 data; 4 checkpoint; 5 engine; 6 disk full; 7 GPU lost; 130 interrupted."""

_MODULES = frozenset({"clean", "completion", "doctor", "init", "kill", "track"})
"""Commands that are modules of `launcher.commands`."""

_PROGRAM: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
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
        from launcher.reach import choose_host

        choose_host(value)


def _from_file(ctx: click.Context, param: click.Parameter) -> bool:
    return ctx.get_parameter_source(param.name or "") is ParameterSource.DEFAULT_MAP


shared = _shared  # for the commands in launcher/commands


class _Launcher(click.Group):
    """The commands below, and those that have a module of their own, imported when they are named."""

    command_class = ConfiguredCommand

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names, in the order of the alphabet."""
        return sorted({*super().list_commands(ctx), *_MODULES})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name."""
        if cmd_name in _MODULES and cmd_name not in self.commands:
            module = importlib.import_module(f"launcher.commands.{cmd_name}")
            self.add_command(getattr(module, cmd_name))
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Launcher, context_settings=_PROGRAM, epilog=EXIT_CODES)
@root_option
@click.version_option(VERSION, prog_name="launcher")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Start one trainer on every device of this machine, watch them, and end them."""


@cli.command(
    epilog="""\b
Examples:
  launcher up --gpus 1-5 --memory 20g -- --data ~/blood/bccd.yaml --weights '' \\
      --cfg yolov5n.yaml --img 320 --epochs 10 --project blood --name search --evolve 60
  launcher up --gpus 0-3 --ddp -- --data ~/blood/bccd.yaml --weights '' --cfg yolov5n.yaml --batch 64
  launcher up --cpu 2 --engine local -- --data bccd.yaml --weights '' --cfg yolov5n.yaml"""
)
@click.option(
    "--gpus",
    metavar="LIST",
    help="all, free, free:2, 3, 1-5, 0,2-4, MIG slices (3:0), or UUIDs: one replica each.",
)
@click.option(
    "--cpu", "cpus", type=int, metavar="N", help="N replicas without a GPU, each with its own cores."
)
@click.option("--ddp", is_flag=True, help="One training on all of the devices, in one replica.")
@click.option("--force", is_flag=True, help="Take GPUs that others hold.")
@click.option(
    "--memory", metavar="SIZE", help="Limit for each device, swap included [90 % of the machine's, shared]."
)
@click.option("--shm", metavar="SIZE", help="/dev/shm for each device [a quarter of its memory, 1g at most].")
@click.option("--image", default="starling:latest", show_default=True, help="Never pulled: see --build.")
@click.option("--build", is_flag=True, help="Build the image first, from the project's folder.")
@click.option("--network", default="bridge", show_default=True, help="An existing Docker network to join.")
@click.option(
    "--tracking", is_flag=True, help="Log to the servers of `launcher track up`: network, address and login."
)
@click.option(
    "--user", metavar="UID:GID", help="Who replicas run as [you; for root: the owner of the runs folder]."
)
@click.option(
    "--env", "env_names", multiple=True, metavar="NAME", help="Pass this variable of yours; repeatable."
)
@click.option(
    "--env-file",
    "env_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Pass NAME=value lines; repeatable.",
)
@click.option(
    "--max-restarts",
    default=3,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Start a crashed trainer again so often.",
)
@click.option("--recreate", is_flag=True, help="Stop a fleet that differs, and start it as given now.")
@click.option(
    "--settle",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Watch the replicas for so long; one that fails by then takes all of this `up` back.",
)
@click.option("--dry-run", is_flag=True, help="Show what would start, and start nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the plan as JSON.")
@_shared
@click.argument("training_args", nargs=-1, type=click.UNPROCESSED, metavar="-- TRAINING ARGUMENTS…")
def up(**options: Any) -> None:
    """Start one replica a device, all running the same training arguments (those after `--`).

    The same `up` again changes nothing; dead replicas are started again and resume. Trackers' variables
    (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN, CLEARML_*) are passed on by themselves.
    """
    from launcher.up import run_up

    run_up(options)


@cli.command()
@click.option("--watch", is_flag=True, help="Refresh until Ctrl-C.")
@click.option("--interval", default=2.0, show_default=True, type=click.FloatRange(min=0.2), metavar="SECONDS")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@_shared
@click.argument("names", nargs=-1)
def status(
    engine: str, runs: Path, watch: bool, interval: float, as_json: bool, names: tuple[str, ...]
) -> None:
    """Show replicas, their devices, states and progress. NAMES: replicas, or fleets as project/name.

    Exits 0 when every replica runs, has finished or was stopped; 1 when one has failed, or there is none.
    """
    from launcher.watch import show_status, watch_status

    chosen = open_engine(engine, runs)
    if watch and not as_json:
        watch_status(chosen, names, interval)
    else:
        sys.exit(show_status(chosen, names, as_json=as_json))


@cli.command()
@click.option("-f", "--follow", is_flag=True, help="Go on until the replicas end, or Ctrl-C.")
@click.option("--tail", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines of each.")
@click.option("--since", metavar="WHEN", help="Only what was said since: 10m, 1h30m, 2026-03-01T14:00.")
@_shared
@click.argument("names", nargs=-1)
def logs(
    engine: str, runs: Path, follow: bool, tail: int | None, since: str | None, names: tuple[str, ...]
) -> None:
    """Print the output of replicas: of several in the order of time, each line marked with its replica."""
    import time

    from launcher.instants import parse_since
    from launcher.output import print_logs

    moment = None if since is None else parse_since(since, time.time())
    print_logs(open_engine(engine, runs), names, follow=follow, tail=tail, since=moment)


@cli.command()
@_shared
@click.argument("name")
def attach(engine: str, runs: Path, name: str) -> None:
    """Watch one replica's output; Ctrl-C leaves, and the replica lives on.

    Exits 0 when you leave or the replica ends well; 1 when it fails.
    """
    from launcher import output
    from launcher.report import exit_code, words_for

    chosen = open_engine(engine, runs)

    def begin() -> None:
        click.echo(f"watching {name}; Ctrl-C leaves it running", err=True)

    try:
        state = output.attach(chosen, name, begin)
    except KeyboardInterrupt:
        click.echo(f"left {name}; it goes on", err=True)
        return
    if state is not None:
        click.echo(f"{state.name}: {words_for(state)}", err=True)
        sys.exit(exit_code([state]))


@cli.command()
@click.option(
    "--grace", default=float(STOP_GRACE_S), show_default=True, type=click.FloatRange(min=0), metavar="SECONDS"
)
@_shared
@click.argument("names", nargs=-1)
def stop(engine: str, runs: Path, grace: float, names: tuple[str, ...]) -> None:
    """Ask replicas to save and end (SIGTERM), kill those that outlast the grace, and report.

    Without NAMES: all of yours. They stay listed, and the same `up` resumes them. Exits 1 when one had to be killed,
    or had failed.
    """
    from launcher import fleet
    from launcher.watch import show_status

    chosen = open_engine(engine, runs)
    states = fleet.select(chosen.list(), names)
    if not states:
        click.echo("none: nothing to stop")
        return
    fleet.stop(chosen, states, grace_s=grace, say=say)
    sys.exit(show_status(chosen, [state.name for state in states]))


@cli.command("kill-all")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document; with --yes.")
@_shared
@click.argument("names", nargs=-1)
def kill_all(engine: str, runs: Path, yes: bool, as_json: bool, names: tuple[str, ...]) -> None:
    """Kill and remove your replicas, and nobody else's containers. NAMES narrow it to replicas or fleets."""
    import json

    from launcher import fleet
    from launcher.errors import EngineError
    from launcher.report import device_words, words_for

    if as_json and not yes:
        raise UsageError("--json: nobody can be asked then; give --yes")
    chosen = open_engine(engine, runs)
    states = fleet.select(chosen.list(), names)
    if not states and not as_json:
        click.echo("none: nothing to remove")
        return
    for state in () if as_json else states:
        say(f"{state.name}  {device_words(state.device)}  {words_for(state)}  {state.id[:12]}")
    if not yes and not _confirmed(f"kill and remove {_count(states)}?"):
        click.echo("nothing removed")
        sys.exit(1)
    failures = fleet.discard(chosen, states)
    if failures:
        raise EngineError("could not remove " + "; ".join(failures))
    if as_json:
        click.echo(json.dumps({"removed": [state.name for state in states]}, indent=2))
    else:
        click.echo(f"removed {_count(states)}; what they wrote stays in the runs folder")


def open_engine(name: str, runs: Path) -> Engine:
    """Return the engine that `--engine` names; raises EngineError when it does not answer."""
    from launcher.ownership import caller_ids

    owner = caller_ids()[0]
    if name == "local":
        from launcher.engines.local import LocalEngine

        _refuse_host()
        return LocalEngine(absolute(runs), owner)
    if name == "docker":
        from launcher.engines.docker import DockerEngine
        from launcher.reach import open_box

        box = open_box()
        engine = DockerEngine(owner if box is None else box.ids[0])
        if box is not None or not engine.is_podman:
            return engine
    from launcher.engines.podman import PodmanEngine, socket_address

    return PodmanEngine(owner, None if name == "docker" else socket_address(os.environ, os.getuid()))


def _refuse_host() -> None:
    ctx = click.get_current_context(silent=True)
    if ctx is not None and ctx.get_parameter_source("host") is ParameterSource.COMMANDLINE:
        raise UsageError("--host: processes run on this machine only; leave it out with --engine local")


def absolute(path: Path) -> Path:
    """Return `path` expanded and absolute, its links kept as they are."""
    return Path(os.path.abspath(at_home(path)))


def say(line: str) -> None:
    """Print one line now, even into a pipe; what is being done goes on when nobody reads there any more (`| head -1`)."""
    try:
        click.echo(line)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """Let nothing more be said: also the interpreter must not try at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _confirmed(question: str) -> bool:
    try:
        return click.confirm(question)
    except click.Abort:
        raise UsageError("kill-all asks first and nobody answers here; give --yes") from None


def _count(states: Sequence[ReplicaState]) -> str:
    return f"{len(states)} replica{'s' * (len(states) != 1)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; every error made on purpose is one message and its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        problem = impossible(words)
        if problem:
            raise UsageError(problem)
        code = cli.main(args=words, prog_name="launcher", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except LauncherError as error:
        if "--debug" in words[:1]:
            raise
        # A name on the command line need not be UTF-8, and not every stream takes it then.
        click.echo(f"error: {error}".encode("utf-8", "backslashreplace").decode(), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        _drop_output()  # the reader (`head`) has gone
        sys.exit(0)
    except OSError as error:
        full: LauncherError | None = disk_full(error)
        if error.errno == errno.ENAMETOOLONG:
            full = UsageError(f"{shown(error.filename)}: {error.strerror}")
        elif problem := lost_folder():
            full = UsageError(problem)
        if full is None or "--debug" in words[:1]:
            raise
        click.echo(f"error: {full}", err=True)
        sys.exit(full.exit_code)
