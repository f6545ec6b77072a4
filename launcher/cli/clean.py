"""`launcher clean`: remove the containers and records of ended replicas, and their results with --runs-too."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.context import Target, shared
from launcher.console import confirmed
from launcher.errors import EngineError
from launcher.options.config_file import ConfiguredCommand
from starling.core.errors import StarlingError, UsageError
from starling.core.paths import absolute

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.engines.base import Engine, ReplicaState
    from launcher.status.run_folders import RunFolder


@click.command(cls=ConfiguredCommand)
@click.option("--runs-too", is_flag=True, help="Also remove the run folders of their fleets.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only show the list.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document; with --yes or --dry-run.")
@shared
@click.argument("names", nargs=-1)
def clean(
    target: Target,
    runs_too: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
    names: tuple[str, ...],
) -> None:
    """Remove the containers and records of replicas that have ended, after showing the list and asking.

    NAMES select replicas, or fleets as project/name. Running replicas stay. --runs-too also removes the fleets'
    results (weights, studies, plots), except those of a running fleet and folders whose lock is held.
    """
    if as_json and not (yes or dry_run):
        raise UsageError("--json: asks for no confirmation; give --yes, or --dry-run to see the list")
    chosen = target.open_engine()
    found = _find(chosen, absolute(target.runs), names, runs_too=runs_too)
    if as_json:
        if not dry_run:
            _remove(chosen, found)
        click.echo(json.dumps(found.as_dict(removed=not dry_run), indent=2))
        return
    for line in found.lines():
        click.echo(line)
    if not (found.ended or found.folders):
        click.echo("none: nothing to clean")
        return
    if dry_run:
        return
    if not yes and not confirmed(f"remove {found.words()}?", "clean"):
        click.echo("nothing removed")
        sys.exit(1)
    _remove(chosen, found)
    click.echo(f"removed {found.words()}")


@dataclass(frozen=True, slots=True)
class _Found:
    """The replicas and run folders to remove, and the running replicas that stay."""

    ended: Sequence[ReplicaState]
    live: Sequence[ReplicaState]
    folders: Sequence[tuple[Path, RunFolder]]
    """Pairs of the runs folder and a run folder in it."""

    def lines(self) -> list[str]:
        from launcher.status.words import words_for
        from starling.core.units import format_size

        lines = [f"{state.name}  {words_for(state)}  {state.id[:12]}" for state in self.ended]
        lines += [f"{run.path}  {run.files} files, {format_size(run.bytes)}" for _, run in self.folders]
        return lines + [f"{state.name}  {words_for(state)}: stays" for state in self.live]

    def words(self) -> str:
        count, folders = len(self.ended), len(self.folders)
        parts = [f"{count} replica{'s' * (count != 1)}"] if count else []
        parts += [f"{folders} run folder{'s' * (folders != 1)} with all results in it"] if folders else []
        return " and ".join(parts)

    def as_dict(self, *, removed: bool) -> dict[str, Any]:
        return {
            "removed": removed,
            "replicas": [state.name for state in self.ended],
            "runs": [
                {"path": str(run.path), "files": run.files, "bytes": run.bytes} for _, run in self.folders
            ],
            "running": [state.name for state in self.live],
        }


def _find(engine: Engine, runs: Path, names: Sequence[str], *, runs_too: bool) -> _Found:
    from launcher.status.run_folders import run_folders, unused
    from launcher.status.selection import select

    if runs_too and engine.host.remote:
        raise UsageError(
            "--runs-too: results on another machine are removed there: run `launcher clean --runs-too` on "
            f"{engine.host.name or 'it'}"
        )
    everyone = engine.list()
    known = {state.name for state in everyone} | {state.fleet for state in everyone}
    # A fleet whose replicas are already removed may still have results.
    bare = [name for name in names if runs_too and name not in known and "/" in name]
    wanted = [name for name in names if name not in bare]
    states = select(everyone, wanted) if wanted or not bare else []
    ended = [state for state in states if not state.live]
    folders: dict[Path, tuple[Path, RunFolder]] = {}
    if runs_too:
        places = {(state.fleet, state.runs): None for state in ended} | {(name, runs): None for name in bare}
        for name, place in places:
            working = [state.name for state in everyone if state.fleet == name and state.live]
            if working:
                raise UsageError(
                    f"{name}: {', '.join(working)} still runs, so its results stay; stop it first"
                )
            replicas = [state.name for state in everyone if state.fleet == name]
            for run in run_folders(place, name, replicas):
                with unused(place, run):
                    folders[run.path] = (place, run)
        gone = [name for name in bare if not any(run.fleet == name for _, run in folders.values())]
        if gone:
            raise UsageError(f"{gone[0]}: no replica or fleet of this name, and no results of it in {runs}")
    return _Found(ended, [state for state in states if state.live], list(folders.values()))


def _remove(engine: Engine, found: _Found) -> None:
    """Remove everything found; raises EngineError with every failure after all removals have been tried."""
    from launcher.fleet.end import discard
    from launcher.status.run_folders import delete, forget_workers, unused

    still = [state for state in found.ended if (now := engine.state(state.id)) is not None and not now.live]
    failures = discard(engine, still)
    for runs, run in found.folders:
        try:
            with unused(runs, run) as folder:  # check again: the user may have answered late
                delete(runs, run, folder)
        except StarlingError as error:
            failures.append(str(error))
    if found.folders:
        for state in still:
            forget_workers(state.runs, [state.name])
    if failures:
        raise EngineError("could not remove " + "; ".join(failures))
