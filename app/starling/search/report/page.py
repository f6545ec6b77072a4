"""The report as one page: sections in the order of a reader's questions."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

from starling.core.units import format_duration
from starling.search.outcome import State
from starling.search.report.charts import chosen_genes, parallel_chart, progress_chart, timeline
from starling.search.report.facts import (
    FEWEST_FOR_IMPORTANCE,
    IMPORTANCE_METHOD,
    ReportFacts,
    gene_importance,
    winner_command,
    worker_times,
)
from starling.search.report.markup import Markup, compact, element, join, number, percent, text, void
from starling.search.report.tables import (
    candidate_table,
    ended_early_table,
    hyp_table,
    importance_table,
    worker_table,
)

_HERE = Path(__file__).parent
FEW_FOR_IMPORTANCE = 200
"""Number of finished candidates below which the page warns about the importances."""
_STATES = (State.FINISHED, State.PRUNED, State.FAILED, State.LOST, State.STOPPED, State.RUNNING)


def build_page(facts: ReportFacts) -> str:
    """Return the whole HTML document: one file that fetches nothing, whatever text names and reasons contain."""
    importance = gene_importance(facts.finished, list(facts.seed_hyp))
    sections = (
        _headline(facts),
        _winner(facts),
        _progress(facts),
        _parallel(facts, importance),
        _importance(facts, importance),
        _workers(facts),
        _ended_early(facts),
        _candidates(facts),
        _hyp(facts),
    )
    return _document(f"Search {facts.name}", join(*sections))


def _document(title: str, body: Markup) -> str:
    script = (_HERE / "sort.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Even a script that slipped through the escaping could neither run nor connect to anything.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = join(
        void("meta", charset="utf-8"),
        void("meta", http_equiv="Content-Security-Policy", content=policy),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup((_HERE / "style.css").read_text())),
    )
    page = element(
        "html", element("head", head), element("body", body, element("script", Markup(script))), lang="en"
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _section(title: str, *parts: object) -> Markup:
    return element("section", element("h2", title), *parts)


def _soft(*words: object) -> Markup:
    return element("p", *words, class_="soft")


def _tile(what: str, figure: str, class_: str | None = None) -> Markup:
    return element("div", element("dt", what), element("dd", figure), class_=class_)


def _headline(facts: ReportFacts) -> Markup:
    progress, counts = facts.progress, {state: facts.count(state) for state in _STATES}
    tiles = [_tile("finished of the budget", f"{progress.finished}/{progress.budget}")]
    if progress.part_trained:
        tiles = [
            _tile("trainings' time spent", f"{progress.spent:.1f}/{progress.budget}"),
            _tile("finished", str(progress.finished)),
        ]
    if facts.best is not None:
        fresh = " on fresh seeds" if facts.best.again else ""
        tiles.insert(0, _tile(f"best fitness{fresh}", number(facts.best.judged), "main"))
        if facts.seed_fitness is not None:
            tiles.insert(1, _tile("fitness of the seed", number(facts.seed_fitness)))
    tiles += [_tile("running", str(progress.running)), _tile("failed", str(progress.failed))]
    if counts[State.PRUNED]:
        tiles.append(_tile("pruned", str(counts[State.PRUNED])))
    retried = counts[State.LOST] + counts[State.STOPPED]
    if retried:
        tiles.append(_tile("interrupted attempts", str(retried)))
    images = [cost.images for cost in facts.costs.values()]
    if images and None not in images:
        tiles.append(_tile("images trained", compact(round(sum(i or 0 for i in images)))))
    if facts.imported:
        tiles.append(_tile("imported results", str(facts.imported)))
    done = "finished" if progress.over else "under way"
    return element(
        "header",
        element("h1", f"Search {facts.name}"),
        _soft(f"{done}; as of {facts.now:%Y-%m-%d %H:%M:%S}, written by a worker: open it again for newer figures"),
        element("dl", *tiles, class_="tiles"),
    )  # fmt: skip


def _winner(facts: ReportFacts) -> Markup:
    best = facts.best
    if best is None:
        return _section("The winner", element("p", "No candidate has finished yet."))
    names = ("map50", "map5095", "precision", "recall")
    map50, map5095, precision, recall = (best.metrics.get(name, math.nan) for name in names)
    lines: list[object] = [
        element(
            "p",
            f"Candidate {best.number}, trained by {best.worker}: mAP50 {map50:.4f}, mAP50-95 "
            f"{map5095:.4f}, precision {precision:.3f}, recall {recall:.3f}"
            f"{_against_seed(facts)}.",
        )
    ]
    if best.again:
        fresh = ", ".join(number(value) for value in best.again)
        lines.append(_soft(f"As a finalist it was trained again on fresh seeds, with a fitness of {fresh}."))
    settings = facts.training.get("command")
    command = winner_command(settings, facts.directory) if isinstance(settings, Mapping) else ""
    if command:
        epochs = facts.signature.get("epochs")
        longer = (
            f"longer than the search's {epochs} epoch{'s' * (epochs != 1)}"
            if isinstance(epochs, int)
            else "longer"
        )
        lines += [
            _soft(
                f"To train with the winner's hyperparameters, {longer}, from the folder that contains runs:"
            ),
            element("pre", element("code", command), tabindex="0"),
        ]
    if not facts.progress.over:
        lines.append(_soft("The search goes on; a better one may come."))
    return _section("The winner", *lines)


def _against_seed(facts: ReportFacts) -> str:
    seed, best = facts.seed_fitness, facts.best
    if best is None or seed is None or best.is_seed:
        return "; it is the hyp that the search started from" if best is not None and best.is_seed else ""
    return f"; {percent(best.fitness / seed - 1)} above the seed's fitness" if seed > 0 else ""


def _progress(facts: ReportFacts) -> Markup:
    if not facts.finished:
        return Markup("")
    pruned = facts.count(State.PRUNED)
    keys = [("best so far", _mark("path", "best", d="M1 8L18 8")), ("a candidate", _mark("circle", "dot", cx=9, cy=8, r=4)),
            ("the winner", _mark("circle", "winner", cx=9, cy=8, r=6))]  # fmt: skip
    if pruned:
        keys.append(("pruned", _mark("path", "cross", d="M4 3l10 10m0 -10l-10 10")))
    if any(attempt.finalist_of is not None for attempt in facts.attempts):
        keys.append(("trained again as a finalist", _mark("circle", "ring", cx=9, cy=8, r=6)))
    notes = (
        "All workers together, in the order in which candidates ended. Validation images count a third; failed, lost "
        "and pruned trainings count too. Fitness is 0.1 mAP50 + 0.9 mAP50-95; values below the frame are drawn on its "
        "edge."
    )
    wide = element("div", progress_chart(facts), class_="wide")
    narrow = element("div", progress_chart(facts, 330, name="progress-narrow"), class_="narrow")
    return _section("Best so far", _key(keys), wide, narrow, _soft(notes))


def _mark(name: str, class_: str, **attributes: object) -> Markup:
    return element(
        "svg", void(name, class_=class_, **attributes), viewBox="0 0 19 16", aria_hidden="true", focusable="false"
    )  # fmt: skip


def _key(entries: list[tuple[str, Markup]]) -> Markup:
    return element("ul", *(element("li", mark, words) for words, mark in entries), class_="key")


def _parallel(facts: ReportFacts, importance: dict[str, float]) -> Markup:
    genes = chosen_genes(facts, importance)
    if len(facts.finished) < 2 or not genes:
        return Markup("")
    which = (
        "the genes that matter most, in that order"
        if importance
        else "the genes in which the winner lies farthest from the seed"
    )
    shades = [(f"{words} fitness", _mark("path", f"line {class_}", d="M1 8L18 8"))
              for words, class_ in (("lowest", "f0"), ("middling", "f5"), ("highest", "f9"))]  # fmt: skip
    key = _key([*shades, ("the winner", _mark("path", "line winner", d="M1 8L18 8"))])
    return _section(
        "Genes and fitness", _soft(f"One line per finished candidate, over {which}."), key, parallel_chart(facts, genes)
    )  # fmt: skip


def _importance(facts: ReportFacts, importance: dict[str, float]) -> Markup:
    if importance:
        n = len(facts.finished)
        caution = (
            f" {n} candidates are few for {len(importance)} genes: the first places are likely right, their order is not."
            if n < FEW_FOR_IMPORTANCE
            else ""
        )
        return _section(
            "Which genes matter", _soft(f"By {IMPORTANCE_METHOD}.{caution}"), importance_table(importance)
        )
    n = len(facts.finished)
    reason = (
        f"{n} candidates have finished; below {FEWEST_FOR_IMPORTANCE} the importance of so many genes is hardly better than guessing."
        if n < FEWEST_FOR_IMPORTANCE
        else "All candidates have the same fitness or the same genes."
    )
    return _section("Which genes matter", _soft(reason))


def _workers(facts: ReportFacts) -> Markup:
    workers = worker_times(facts.attempts, facts.now)
    if not workers:
        return Markup("")
    states = [state for state in _STATES if facts.count(state)]
    idle, busy = sum(worker.idle for worker in workers), sum(worker.busy for worker in workers)
    whole = percent(idle / (idle + busy)) if idle + busy else "0 %"
    summary = f"{len(workers)} worker{'s' if len(workers) > 1 else ''}, {format_duration(busy)} of training in all, {whole} idle."
    return _section(
        "Workers",
        element("p", summary),
        _key([(str(s), _mark("rect", f"s-{s}", x=2, y=2, width=15, height=12)) for s in states]),
        timeline(facts, workers),
        worker_table(workers),
        _soft("Times are by the clock of each worker's host."),
    )


def _ended_early(facts: ReportFacts) -> Markup:
    states = (State.PRUNED, State.FAILED, State.LOST, State.STOPPED)
    attempts = [attempt for attempt in facts.attempts if attempt.state in states]
    if not attempts:
        return _section("Ended early", element("p", "None was pruned, failed or interrupted."))
    counts = ", ".join(f"{facts.count(state)} {state}" for state in states if facts.count(state))
    attempts.sort(key=lambda attempt: (states.index(attempt.state) if attempt.state is not State.PRUNED else 9,
                                       attempt.number))  # fmt: skip
    return _section("Ended early", element("p", f"{counts}."), ended_early_table(facts, attempts))


def _candidates(facts: ReportFacts) -> Markup:
    if not facts.attempts:
        return Markup("")
    return _section("Candidates", candidate_table(facts))


def _hyp(facts: ReportFacts) -> Markup:
    if facts.best is None:
        return Markup("")
    notes = _soft("The same values are in ", element("code", text("hyp_evolve.yaml")), ".")
    return _section("The winner's hyperparameters", hyp_table(dict(facts.seed_hyp), facts.best.hyp), notes)
