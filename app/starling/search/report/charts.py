"""The report's charts: progress, parallel coordinates, timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from starling.core.units import format_duration
from starling.plots.style import lower_end, shorten
from starling.search.outcome import Attempt, Finished, State
from starling.search.report.facts import ReportFacts, WorkerTime, end_of
from starling.search.report.markup import Markup, compact, join, number, text, void
from starling.search.report.svg import Scale, grid, label, line, path, plot, shade, ticks, titled

WIDE = 600.0
"""Width in pixels below which a chart is made for phones and drawn at its own size."""
ROW, ROW_NAME = 26.0, 160.0
"""Height of a worker's row, and width of the worker's name before the row, in pixels."""
MOST_LINES = 1000
"""Maximum number of candidates in the parallel coordinates, the best ones; more lines would form a solid block."""
MOST_MARKS = 4000
"""Maximum number of dots or bars in one chart, the newest ones."""


def fitness_scale(facts: ReportFacts, start: float, stop: float) -> Scale:
    """Return the scale of fitness that all charts share, also before the first candidate has finished."""
    values = [candidate.fitness for candidate in facts.finished] or [0.0, 1.0]
    low, high = lower_end(values), max(values)
    if not high > low:
        low, high = low - 0.05 * abs(low or 1), high + 0.05 * abs(high or 1)
    return Scale(low, high + 0.04 * (high - low), start, stop)


def progress_chart(facts: ReportFacts, width: float = 900.0, *, name: str = "progress") -> Markup:
    """Draw the best fitness so far and each candidate's fitness, over the training until then; `width` in pixels."""
    height, left, right, top, bottom = 340.0, 54.0, width - 14, 14.0, 290.0
    rows = _bill(facts)
    in_images = all(cost is not None for _, cost, _ in rows)
    totals = [cost if in_images and cost is not None else float(epochs) for _, cost, epochs in rows]
    x = Scale(0.0, max(totals, default=1.0) or 1.0, left, right)
    y = fitness_scale(facts, bottom, top)
    unit = "images through the model" if in_images else "epochs trained"
    frame = grid(
        [(x(value), compact(value)) for value in ticks(0.0, x.high, round(width / 90))],
        [(y(value), number(value)) for value in ticks(y.low, y.high)],
        left=left,
        right=right,
        top=top,
        bottom=bottom,
    )
    marks = [_mark(attempt, x(total), y) for (attempt, _, _), total in zip(rows, totals, strict=True)]
    note = "By all workers together, in the order in which candidates ended"
    return plot(
        width,
        height,
        "Best fitness so far",
        f"Fitness against {unit}. {note}{'; validation images count a third' if in_images else ''}.",
        [
            frame,
            label((left + right) / 2, height - 10, unit, anchor="middle"),
            *marks[-MOST_MARKS:],
            _best_line(facts, rows, totals, x, y),
        ],
        name=name,
        narrowest=width if width < WIDE else 700,
    )


def _bill(facts: ReportFacts) -> list[tuple[Attempt, float | None, int]]:
    """Return the ended attempts in the order of their ends, with the total images and epochs up to each end."""
    ended = [attempt for attempt in facts.attempts if attempt.state is not State.RUNNING]
    rows: list[tuple[Attempt, float | None, int]] = []
    images: float | None = 0.0
    epochs = 0
    for attempt in sorted(ended, key=lambda a: (end_of(a, facts.now), a.number)):
        cost = facts.costs[attempt.number]
        images = None if images is None or cost.images is None else images + cost.images
        epochs += cost.epochs
        rows.append((attempt, images, epochs))
    return rows


def _mark(attempt: Attempt, x: float, y: Scale) -> Markup:
    """Draw one attempt: a dot, a ring for a finalist, a cross for a pruned one; nothing if it has no fitness."""
    if attempt.state is State.PRUNED and attempt.curve:
        epoch, fitness = max(attempt.curve.items())
        words = f"candidate {attempt.number}: pruned at {number(fitness)} after {epoch} epochs"
        return titled("path", words, d=f"M{x - 3:g} {y(fitness) - 3:g}l6 6m0 -6l-6 6", class_="cross")
    if attempt.state is not State.FINISHED or attempt.fitness is None:
        return Markup("")
    words = f"candidate {attempt.number}: fitness {number(attempt.fitness)}"
    cx, cy = f"{x:g}", f"{y(attempt.fitness):g}"
    if attempt.finalist_of is None:
        return titled("circle", words, cx=cx, cy=cy, r=3.2, class_="dot")
    words += f", trains candidate {attempt.finalist_of} again"
    return titled("circle", words, cx=cx, cy=cy, r=5, class_="ring")


def _best_line(
    facts: ReportFacts,
    rows: Sequence[tuple[Attempt, float | None, int]],
    totals: Sequence[float],
    x: Scale,
    y: Scale,
) -> Markup:
    """Draw the steps of the best fitness so far, and a ring around the winner."""
    points: list[tuple[float, float]] = []
    ring = Markup("")
    best: float | None = None
    for (attempt, _, _), total in zip(rows, totals, strict=True):
        if attempt.state is not State.FINISHED or attempt.fitness is None:
            continue
        if facts.best is not None and attempt.number == facts.best.number:
            words = f"the winner, candidate {attempt.number}: fitness {number(attempt.fitness)}"
            cx, cy = f"{x(total):g}", f"{y(attempt.fitness):g}"
            ring = titled("circle", words, cx=cx, cy=cy, r=6.5, class_="winner")
        if attempt.finalist_of is None and (best is None or attempt.fitness > best):
            if best is not None:
                points.append((x(total), y(best)))
            best = attempt.fitness
            points.append((x(total), y(best)))
    if best is None:
        return Markup("")
    points.append((x(totals[-1]), y(best)))
    return join(void("path", d=path(points), class_="best"), ring)


def parallel_chart(facts: ReportFacts, genes: Sequence[str]) -> Markup:
    """Draw one line per finished candidate over the axes of `genes` and the fitness; the winner's is bold, on top."""
    width, height, top, bottom = 900.0, 374.0, 54.0, 330.0
    own = sorted(facts.finished, key=lambda candidate: (candidate.fitness, -candidate.number))[-MOST_LINES:]
    names = [*genes, "fitness"]
    xs = [64 + index * (width - 124) / (len(names) - 1) for index in range(len(names))]
    fitness = replace(fitness_scale(facts, bottom, top), high=own[-1].fitness)
    scales = [gene_scale([c.hyp[name] for c in own], bottom, top) for name in genes] + [fitness]
    lines = []
    for rank, candidate in enumerate(own):
        values = [*(candidate.hyp[name] for name in genes), candidate.fitness]
        points = [(x, scale(value)) for x, scale, value in zip(xs, scales, values, strict=True)]
        is_best = facts.best is not None and candidate.number == facts.best.number
        class_ = "line winner" if is_best else f"line {shade(rank, len(own))}"
        words = f"candidate {candidate.number}: fitness {number(candidate.fitness)}"
        lines.append(titled("path", words, d=path(points), class_=class_))
    axes = [
        join(
            line(x, top, x, bottom, "axis"),
            label(x, top - 20 - 16 * (index % 2), shorten(name, 16), anchor="middle", class_="name"),
            label(x, top - 6, number(scale.high, 3), anchor="middle"),
            label(x, bottom + 16, ("≤ " if name == "fitness" else "") + number(scale.low, 3), anchor="middle"),
            label(x, bottom + 31, "log" if scale.log else "", anchor="middle", class_="faint"),
        )
        for index, (x, name, scale) in enumerate(zip(xs, names, scales, strict=True))
    ]  # fmt: skip
    return plot(
        width,
        height,
        "Genes and fitness of every finished candidate",
        f"Parallel coordinates over {', '.join(names)}; the colour is the rank by fitness, the bold line is the winner.",
        [*lines, *axes],
        name="parallel",
    )


def gene_scale(values: Sequence[float], start: float, stop: float) -> Scale:
    """Return the scale of a gene over its values: logarithmic if they span more than a factor of 20."""
    low, high = min(values), max(values)
    return Scale(low, high, start, stop, log=low > 0 and high / low > 20)


def timeline(facts: ReportFacts, workers: Sequence[WorkerTime]) -> Markup:
    """Draw one row per worker: each training is a bar in the colour of its state, idle time stays blank."""
    width, bottom = 900.0, 10 + ROW * len(workers)
    attempts = [attempt for worker in workers for attempt in worker.attempts]
    begin = min(attempt.began for attempt in attempts if attempt.began is not None)
    seconds = max((max(end_of(a, facts.now) for a in attempts) - begin).total_seconds(), 1.0)
    x = Scale(0.0, seconds, ROW_NAME, width - 14)
    hours = [(x(at), _clock(at, seconds)) for at in _time_ticks(seconds)]
    parts = [grid(hours, [], left=x.start, right=x.stop, top=6, bottom=bottom)]
    most = max(MOST_MARKS // len(workers), 1)
    for index, worker in enumerate(workers):
        y = 10 + ROW * index
        parts.append(titled("text", worker.name, text(shorten(worker.name, 22)), x=f"{ROW_NAME - 8:g}", y=f"{y + 15:g}",
                            text_anchor="end"))  # fmt: skip
        parts += [
            _bar(attempt, begin, end_of(attempt, facts.now), x, y) for attempt in worker.attempts[-most:]
        ]
    return plot(
        width,
        bottom + 26,
        "What each worker did when",
        f"{len(workers)} workers over {format_duration(seconds)}, a bar per training; the table below has the figures.",
        parts,
        name="timeline",
    )


def _bar(attempt: Attempt, begin: datetime, end: datetime, x: Scale, y: float) -> Markup:
    """Draw one training in a worker's row with the upper edge at `y` pixels; `begin` is the start of the time scale."""
    assert attempt.began is not None, "it has begun"
    start, stop = (x((at - begin).total_seconds()) for at in (attempt.began, end))
    took = (end - attempt.began).total_seconds()
    words = f"candidate {attempt.number}: {attempt.state}, {format_duration(took)}"
    return titled("rect", words, x=f"{start:g}", y=f"{y:g}", width=f"{max(stop - start - 0.6, 0.8):g}",
                  height=f"{ROW - 8:g}", class_=f"s-{attempt.state}")  # fmt: skip


def _time_ticks(seconds: float) -> list[float]:
    steps = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 4 * 3600, 12 * 3600, 86400)
    step = next((s for s in steps if seconds / s <= 8), 86400 * max(round(seconds / 86400 / 8), 1))
    return [float(step * n) for n in range(int(seconds // step) + 1)]


def _clock(at: float, span: float) -> str:
    """Return a time since the start: `1:30` (minutes), `2:05 h`, `3 d`."""
    if at >= 86400 and at % 86400 == 0:
        return f"{at / 86400:.0f} d"
    whole = timedelta(seconds=round(at))
    hours, rest = divmod(int(whole.total_seconds()), 3600)
    return f"{hours}:{rest // 60:02d} h" if span >= 2 * 3600 else f"{hours * 60 + rest // 60}:{rest % 60:02d}"


def chosen_genes(facts: ReportFacts, importance: dict[str, float], most: int = 8) -> list[str]:
    """Return the genes to draw: the most important ones, or without importances those farthest from the seed."""
    if importance:
        return list(importance)[:most]
    best = facts.best
    if best is None:
        return facts.genes[:most]
    return sorted(facts.genes, key=lambda name: -_change(facts, best, name))[:most]


def _change(facts: ReportFacts, best: Finished, name: str) -> float:
    """Return the distance of the winner's gene from the seed's, as a fraction of the range that the search covered."""
    values = [candidate.hyp[name] for candidate in facts.finished]
    span = max(values) - min(values)
    return abs(best.hyp[name] - facts.seed_hyp[name]) / span if span else 0.0
