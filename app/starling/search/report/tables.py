"""The report's tables: sortable by script, complete without script; a check box folds long tables without script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starling.core.units import format_duration
from starling.search.outcome import Attempt, State
from starling.search.report.facts import ReportFacts, WorkerTime, end_of
from starling.search.report.markup import Markup, compact, element, join, number, percent, text, void

SHOWN = 20
"""Number of visible rows of a folded table."""
MOST_ROWS = 2000
"""Maximum number of rows on the page; evolve.csv and the study have the rest."""
_UNCHANGED = "–"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: the visible content, and the sort key if it differs from the content."""

    words: object
    by: object | None = None
    class_: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One row; `class_` marks the winner's row."""

    cells: Sequence[Cell]
    class_: str | None = None


def table(
    name: str, caption: str, heads: Sequence[str], rows: Sequence[Row], *, words: Sequence[int] = ()
) -> Markup:
    """Return a table whose first column holds row headers; columns in `words` are text, the others figures.

    Rows beyond the first `SHOWN` are folded.
    """  # fmt: skip
    left_out = len(rows) - MOST_ROWS
    rows = rows[:MOST_ROWS]
    folded = len(rows) > SHOWN
    head = element(
        "tr",
        *(element("th", h, scope="col", class_="words" if i in words else None) for i, h in enumerate(heads)),
    )
    bodies = [element("tbody", *(_row(row, words) for row in rows[:SHOWN]))]
    if folded:
        bodies.append(element("tbody", *(_row(row, words) for row in rows[SHOWN:]), class_="rest"))
    if left_out > 0:
        caption += f" {left_out} more are not on this page; evolve.csv has all that finished."
    inner = element(
        "table", element("thead", head), *bodies, class_="sortable", id=name, aria_describedby=f"{name}-about"
    )
    # No <caption>: a caption is as wide as its table, and would be cut off when the table scrolls.
    about = element("p", caption, class_="soft", id=f"{name}-about")
    fold = Markup("")
    if folded:
        fold = join(
            void("input", type="checkbox", class_="more", id=f"{name}-more"),
            element(
                "label",
                element("span", f"Show all {len(rows)} rows", class_="shut"),
                element("span", f"Show the first {SHOWN} rows only", class_="open"),
                for_=f"{name}-more",
            ),
        )
    scroll = element(
        "div", inner, class_="scroll", tabindex="0", role="group", aria_labelledby=f"{name}-about"
    )
    return element("div", about, fold, scroll)


def _row(row: Row, words: Sequence[int]) -> Markup:
    cells = []
    for index, cell in enumerate(row.cells):
        classes = " ".join(filter(None, ["words" if index in words else "", cell.class_ or ""]))
        cells.append(
            element(
                "td" if index else "th",
                cell.words,
                scope=None if index else "row",
                class_=classes or None,
                data_v=cell.by,
            )
        )
    return element("tr", *cells, class_=row.class_)


def state_cell(state: State) -> Cell:
    """Return a state with its colour."""
    return Cell(join(element("span", class_=f"dotmark b-{state}"), text(state)), str(state))


def candidate_table(facts: ReportFacts) -> Markup:
    """Return the table of all attempts, best first."""
    best = None if facts.best is None else facts.best.number
    order = sorted(facts.attempts, key=lambda a: (a.fitness is None, -(a.fitness or 0.0), a.number))
    rows = [
        Row(_candidate(facts, attempt), "winner" if attempt.number == best else None) for attempt in order
    ]
    heads = ("candidate", "state", "fitness", "mAP50", "mAP50-95", "P", "R", "epochs", "images", "took", "worker",
             "note")  # fmt: skip
    caption = "Every started training, best first."
    return table("candidates", caption, heads, rows, words=(1, 10, 11))


def _candidate(facts: ReportFacts, attempt: Attempt) -> list[Cell]:
    cost = facts.costs[attempt.number]
    took = (end_of(attempt, facts.now) - (attempt.began or facts.now)).total_seconds()
    metrics = [_figure(attempt.metrics.get(name)) for name in ("map50", "map5095", "precision", "recall")]
    return [
        Cell(attempt.number),
        state_cell(attempt.state),
        _figure(attempt.fitness, 5),
        *metrics,
        Cell(cost.epochs or "", cost.epochs),
        Cell("" if not cost.images else compact(cost.images), cost.images or ""),
        Cell(format_duration(took), f"{took:.0f}"),
        Cell(attempt.worker),
        Cell(_note(attempt)),
    ]


def _figure(value: float | None, digits: int = 4) -> Cell:
    return Cell("", "") if value is None else Cell(f"{value:.{digits}f}", f"{value:.7g}")


def _note(attempt: Attempt) -> str:
    notes = []
    if attempt.number == 0 or (attempt.root == 0 and attempt.state is State.FINISHED):
        notes.append("the seed")
    if attempt.finalist_of is not None:
        notes.append(f"trains {attempt.finalist_of} again")
    if attempt.root != attempt.number:
        notes.append(f"goes on with {attempt.root}")
    return ", ".join(notes)


def worker_table(workers: Sequence[WorkerTime]) -> Markup:
    """Return the table of the workers' times."""
    rows = [
        Row(
            [
                Cell(worker.name, class_="words"),
                Cell(len(worker.attempts)),
                Cell(sum(attempt.state is State.FINISHED for attempt in worker.attempts)),
                _seconds(worker.busy),
                _seconds(worker.idle),
                Cell(percent(worker.idle_share), f"{worker.idle_share:.6f}"),
                _seconds(worker.away),
            ]
        )
        for worker in workers
    ]
    heads = ("worker", "begun", "finished", "training", "idle", "idle share", "away")
    caption = "Idle: between two trainings. Away: from a stop or a loss until the next training."
    return table("workers", caption, heads, rows, words=(0,))


def _seconds(seconds: float) -> Cell:
    return Cell(
        format_duration(seconds) if seconds >= 1 or not seconds else f"{seconds:.1f}s", f"{seconds:.2f}"
    )


def ended_early_table(facts: ReportFacts, attempts: Sequence[Attempt]) -> Markup:
    """Return the table of attempts without a result, with their reasons."""
    rows = [
        Row(
            [
                Cell(attempt.number),
                state_cell(attempt.state),
                Cell(facts.costs[attempt.number].epochs),
                Cell(attempt.reason or "no reason noted", class_="long"),
                Cell(attempt.worker),
            ]
        )
        for attempt in attempts
    ]
    caption = "Other workers continue lost and stopped attempts, unless a candidate was lost too often."
    return table(
        "early", caption, ("candidate", "state", "epochs", "reason", "worker"), rows, words=(1, 3, 4)
    )


def importance_table(importance: dict[str, float], most: int = 15) -> Markup:
    """Return the table of the most important genes, with one bar each."""
    top = max(importance.values())
    rows = [
        Row([Cell(name, class_="words"), Cell(percent(share), f"{share:.6f}"), Cell(_bar(share / top), class_="bars")])
        for name, share in list(importance.items())[:most]
    ]  # fmt: skip
    rest = list(importance.values())[most:]
    caption = "Share of the importance of all genes."
    if rest:
        caption += f" The other {len(rest)} genes together: {percent(sum(rest))}."
    return table("importance", caption, ("gene", "share", ""), rows, words=(0,))


def _bar(share: float) -> Markup:
    return element("span", class_="bar", style=f"width:{100 * share:.0f}%")


def hyp_table(seed: dict[str, float], best: dict[str, float]) -> Markup:
    """Return the winner's hyperparameters beside the seed's, with the factor between them."""
    rows = []
    for name, value in best.items():
        before = seed.get(name)
        rows.append(
            Row(
                [
                    Cell(name, class_="words"),
                    Cell("" if before is None else number(before, 5)),
                    Cell(number(value, 5)),
                    _factor(before, value),
                ]
            )
        )
    rows.sort(key=lambda row: row.cells[3].words == _UNCHANGED)
    return table(
        "hyp",
        "Changed hyperparameters come first.",
        ("hyperparameter", "seed", "winner", "factor"),
        rows,
        words=(0,),
    )


def _factor(before: float | None, value: float) -> Cell:
    if before is None or before == value:
        return Cell(_UNCHANGED, "")
    if before == 0:
        return Cell(f"+{number(value)}", "")
    return Cell(f"× {value / before:.3g}", f"{value / before:.6g}")
