"""Show a search, import results of older searches, and repair its journal.

starling search show runs/blood/search            progress, the best hyp, a table of candidates
starling search report runs/blood/search          write its report.html anew
starling search import old/evolve.csv --to runs/blood/search
                                                       use the results of an older search as parents;
                                                       its trainings had the same epochs and image size
starling search repair runs/blood/search          drop damaged records of its journal, and name their candidates
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from starling.cli.command import run_command
from starling.core.settings.parser import PathParser

if TYPE_CHECKING:
    from starling.search.outcome import Attempt

# Optuna takes most of a second to import, so only the functions that need it import it: help stays fast.


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `starling search`."""
    parser = PathParser(
        prog="starling search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print progress, best hyp and candidates; changes nothing")
    show.add_argument("directory", type=Path, metavar="DIR", help="folder of the search, as runs/evolve/exp")
    report = commands.add_parser("report", help="write report.html anew, and print its path")
    report.add_argument("directory", type=Path, metavar="DIR", help="folder of the search")
    importing = commands.add_parser(
        "import", help="add the results of an evolve.csv to a search as parents; its budget stays"
    )
    importing.add_argument("csv", type=Path, metavar="EVOLVE_CSV", help="as the classic trainer writes it")
    importing.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the search")
    importing.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="epochs of the old trainings [those of opt.yaml beside the file]",
    )
    importing.add_argument(
        "--imgsz",
        type=int,
        metavar="PIXELS",
        help="image side of the old trainings [that of opt.yaml beside the file]",
    )
    repairing = commands.add_parser(
        "repair",
        help="drop only the damaged records of a search's journal, name their candidates, keep a copy",
    )
    repairing.add_argument("directory", type=Path, metavar="DIR", help="folder of the search")
    for command in (show, report, importing, repairing):
        if command is not repairing:
            command.add_argument(
                "--study", metavar="URL", default="", help="database with the study [the journal in DIR]"
            )
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    given = build_parser().parse_args(arguments)
    bodies: dict[str, Callable[[argparse.Namespace], None]] = {
        "show": _show,
        "report": _report,
        "import": _import,
        "repair": _repair,
    }
    return run_command(lambda: given, bodies[given.command], debug=lambda given: False)


def _report(given: argparse.Namespace) -> None:
    from starling.search.report import write_report
    from starling.search.study import SearchStudy

    path = write_report(SearchStudy.read(given.directory, url=given.study))
    print(json.dumps({"report": str(path)}) if given.json else path)


def _import(given: argparse.Namespace) -> None:
    from dataclasses import asdict

    from starling.search.importing import import_csv
    from starling.search.study import SearchStudy

    done = import_csv(
        given.csv.absolute(),
        SearchStudy.read(given.to, url=given.study),
        epochs=given.epochs,
        image_size=given.imgsz,
    )
    if given.json:
        print(json.dumps({"file": str(given.csv), "search": str(given.to), **asdict(done)}))
        return
    for reason in done.left_out:
        print(f"left out: {reason}")
    there = f", {done.already_there} were there already" if done.already_there else ""
    print(f"{given.to}: {done.imported} of {done.rows} results imported{there}")


def _repair(given: argparse.Namespace) -> None:
    from starling.search.storage.repair import as_json, repair

    done = repair(given.directory)
    if given.json:
        print(as_json(done))
        return
    for dropped in done.dropped:
        about = f" (candidate {', '.join(map(str, dropped.candidates))})" if dropped.candidates else ""
        print(f"{done.journal}:{dropped.line}: dropped{about}: {dropped.what}")
    if done.copy is None:
        print(f"{done.journal}: no record is damaged; nothing was changed")
    else:
        print(f"copy of the damaged file: {done.copy}; restart the workers that were running")


def _show(given: argparse.Namespace) -> None:
    from dataclasses import asdict

    from starling.search.exports import metrics_of
    from starling.search.outcome import best_of
    from starling.search.study import SearchStudy

    study = SearchStudy.read(given.directory, url=given.study)
    progress, finished, attempts = study.progress(), study.finished(), study.attempts()
    best = best_of(finished) if finished else None
    if given.json:
        report = {
            "progress": asdict(progress),
            "imported": study.imported(),
            "best": {**asdict(best), "metrics": metrics_of(best)} if best else None,
            "finished": [{**asdict(candidate), "metrics": metrics_of(candidate)} for candidate in finished],
            "attempts": [asdict(attempt) for attempt in attempts],
        }
        print(json.dumps(report, indent=2, default=str))
        return
    print(
        f"{progress.finished}/{progress.budget} finished, {progress.running} running, {progress.failed} failed"
        + _others(attempts, study.imported())
    )
    if best:
        print(f"{'candidate':>9}  {'fitness':>9}  {'mAP50':>9}  {'mAP50-95':>9}  worker")
        for c in finished:
            metrics = metrics_of(c)
            print(
                f"{c.number:>9}  {c.fitness:>9.5f}  {metrics['map50']:>9.5f}  {metrics['map5095']:>9.5f}  {c.worker}"
                + ("  seed" if c.is_seed else "")
                + ("  best" if c is best else "")
            )
    for attempt in attempts:
        if attempt.reason:
            print(f"{attempt.number:>9}  {attempt.state}: {attempt.reason}")
    if best:
        print("best hyp:")
        for name, value in best.hyp.items():
            print(f"  {name}: {value:g}")


def _others(attempts: Sequence[Attempt], imported: int) -> str:
    """Return counts of pruned, interrupted and imported trainings, for the end of the first line."""
    pruned = sum(attempt.state == "pruned" for attempt in attempts)
    interrupted = sum(attempt.state in ("lost", "stopped") for attempt in attempts)
    counts = ((pruned, "pruned"), (interrupted, "interrupted"), (imported, "imported"))
    return "".join(f", {count} {what}" for count, what in counts if count)
