"""`python -m app.search show DIR`: what a search has found so far."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from app.errors import StarlingError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the state of a search, as a table or as JSON; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m app.search", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser(
        "show", help="print progress, best hyp and finished candidates; changes nothing"
    )
    show.add_argument("directory", type=Path, help="folder of the search, as runs/evolve/exp")
    show.add_argument(
        "--study", metavar="URL", default="", help="database that the study lives in [a journal]"
    )
    show.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    try:
        print(_show(given.directory, given.study, as_json=given.json))
    except StarlingError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _show(directory: Path, url: str, *, as_json: bool) -> str:
    from app.search.study import SearchStudy  # Optuna is slow to import
    from app.search.views import best_of

    study = SearchStudy.read(directory, url=url)
    progress, finished = study.progress(), study.finished()
    best = best_of(finished) if finished else None
    if as_json:
        report = {
            "progress": asdict(progress),
            "best": asdict(best) if best else None,
            "finished": [asdict(candidate) for candidate in finished],
        }
        return json.dumps(report, indent=2)
    lines = [
        f"{progress.finished}/{progress.budget} finished, {progress.running} running, {progress.failed} failed"
    ]
    if best:
        lines.append(f"{'candidate':>9}  {'fitness':>9}  {'mAP50':>9}  {'mAP50-95':>9}  worker")
        lines += [
            f"{c.number:>9}  {c.fitness:>9.5f}  {c.metrics['map50']:>9.5f}  {c.metrics['map5095']:>9.5f}  {c.worker}"
            + ("  seed" if c.is_seed else "")
            + ("  best" if c is best else "")
            for c in finished
        ]
        lines.append("best hyp:")
        lines += [f"  {name}: {value:g}" for name, value in best.hyp.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
