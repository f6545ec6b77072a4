"""Import results of older searches from their evolve.csv into a study: as parents for samplers, not as candidates."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from starling.config.hyp import Hyp
from starling.config.yaml_reader import read_yaml
from starling.core.budget import BudgetExceeded
from starling.core.errors import UsageError, suggest
from starling.core.files.regular import read_regular
from starling.core.utf8 import NotUtf8, text_of
from starling.search.exports import ANCHOR_FREE_COLUMNS, METRIC_COLUMNS
from starling.search.study import SearchStudy
from starling.search.trials import IMPORTED

OPTIONS = "opt.yaml"
"""File that the classic trainer writes beside its evolve.csv: the settings of the search."""
MAX_BYTES = 16 << 20
_STRIDES = (32, 64)
_HYPS = [field.name for field in fields(Hyp)]


@dataclass(frozen=True, slots=True)
class OldResult:
    """One finished training of an older search."""

    line: int
    """Line number in the file."""
    hyp: dict[str, float]
    metrics: dict[str, float]
    """Metrics by their names in an outcome."""

    @property
    def fitness(self) -> float:
        """0.1 · mAP50 + 0.9 · mAP50-95, as in training."""
        return 0.1 * self.metrics["map50"] + 0.9 * self.metrics["map5095"]


@dataclass(kw_only=True, slots=True)
class Imported:
    """The result of an import."""

    rows: int
    imported: int = 0
    already_there: int = 0
    left_out: list[str] = field(default_factory=list)
    """Reasons why rows were left out, one per row."""


def import_csv(path: Path, study: SearchStudy, *, epochs: int | None, image_size: int | None) -> Imported:
    """Add the rows of an evolve.csv to the history of the study; workers may run meanwhile.

    `epochs` and `image_size` are those of the old search, needed if no opt.yaml beside the file has them. Rows that the
    study already has are not added again; rows that this search could not have drawn are left out.

    Raises UsageError with the line for a file that is not an evolve.csv, and for trainings with other epochs or
    image size, because their fitness cannot be compared.
    """
    results = read_evolve_csv(path)
    _check_comparable(path, study, epochs, image_size)
    report = Imported(rows=len(results))

    def choose(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        limits = _limits(path, study, trials, results[0])
        known = {_content(trial.params, trial.value) for trial in trials if IMPORTED in trial.user_attrs}
        chosen = []
        for result in results:
            params = {name: result.hyp[name] for name in limits}
            reason = _why_not(result, limits, study.seed_hyp)
            if reason:
                report.left_out.append(f"{path}:{result.line}: {reason}")
            elif _content(params, result.fitness) in known:
                report.already_there += 1
            else:
                known.add(_content(params, result.fitness))
                chosen.append(_as_trial(path, result, params, limits))
        return chosen

    report.imported = study.add_known(choose)
    return report


def _as_trial(
    path: Path, result: OldResult, params: Mapping[str, float], limits: Mapping[str, BaseDistribution]
) -> FrozenTrial:
    return create_trial(
        state=TrialState.COMPLETE,
        value=result.fitness,
        params=dict(params),
        distributions=dict(limits),
        user_attrs={IMPORTED: f"{path.name}:{result.line}", "metrics": result.metrics},
    )


def _content(params: Mapping[str, float], value: float | None) -> tuple[Any, ...]:
    return (*sorted(params.items()), value)


def read_evolve_csv(path: Path) -> list[OldResult]:
    """Return the rows of an evolve.csv, padded by spaces or not. Raises UsageError with the line."""
    try:
        text = text_of(read_regular(path, MAX_BYTES), path)
    except BudgetExceeded as error:
        raise UsageError(f"{path}: {error}, so not an evolve.csv; check the path") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    except NotUtf8 as error:
        raise UsageError(f"{path}: {error}") from None
    try:
        reader = csv.reader(text.splitlines(), strict=True)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise UsageError(f"{path}:{reader.line_num}: not a row of an evolve.csv: {error}") from None
    rows = [(line, cells) for line, cells in rows if any(cells)]
    if not rows:
        raise UsageError(f"{path}: is empty; give the evolve.csv of a search")
    line, header = rows[0]
    metrics, names = _check_header(f"{path}:{line}", header)
    if len(rows) == 1:
        raise UsageError(f"{path}: has a header and no results; there is nothing to import")
    return [_result(f"{path}:{line}", line, metrics, names, cells) for line, cells in rows[1:]]


def _check_header(where: str, header: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of the seven metrics, and of the hyperparameters, which follow them."""
    first, names = list(header[: len(METRIC_COLUMNS)]), list(header[len(METRIC_COLUMNS) :])
    metrics = next(
        (list(kind) for kind in (METRIC_COLUMNS, ANCHOR_FREE_COLUMNS) if first == list(kind.values())), None
    )
    if metrics is None:
        expected = ", ".join(METRIC_COLUMNS.values())
        raise UsageError(f"{where}: not the header of an evolve.csv, which begins with {expected}")
    for name in names:
        if name not in _HYPS:
            raise UsageError(f"{where}: unknown hyperparameter {name!r}{suggest(name, _HYPS)}")
        if names.count(name) > 1:
            raise UsageError(f"{where}: the column {name} stands twice; remove one")
    return metrics, names


def _result(
    where: str, line: int, measured: Sequence[str], names: Sequence[str], cells: Sequence[str]
) -> OldResult:
    columns = [*measured, *names]
    if len(cells) != len(columns):
        raise UsageError(
            f"{where}: has {len(cells)} cells under {len(columns)} headings; correct or drop the row"
        )
    values = {}
    for name, cell in zip(columns, cells, strict=True):
        try:
            values[name] = float(cell)
        except ValueError:
            raise UsageError(
                f"{where}: {name} is {cell[:40]!r}, not a number; correct or drop the row"
            ) from None
        if not math.isfinite(values[name]):
            raise UsageError(f"{where}: {name} is {cell}; drop the row, it cannot be ranked")
    metrics = {name: values.pop(name) for name in measured}
    if not all(0 <= metrics[name] <= 1 for name in ("map50", "map5095")):
        raise UsageError(f"{where}: a mAP lies outside [0, 1]; correct or drop the row")
    return OldResult(line, values, metrics)


def _check_comparable(path: Path, study: SearchStudy, epochs: int | None, image_size: int | None) -> None:
    """Refuse results of trainings with another number of epochs or another image size."""
    options = path.with_name(OPTIONS)
    written = read_yaml(options) if options.is_file() else {}
    old = {
        "epochs": _agreed(options, "epochs", written.get("epochs"), epochs),
        "imgsz": _agreed(options, "imgsz", written.get("imgsz"), image_size),
    }
    missing = [f"--{name}" for name, value in old.items() if value is None]
    if missing:
        raise UsageError(
            f"{path}: nothing says how long and at which image size these trainings were; put the search's {OPTIONS} "
            f"beside it, or give {' and '.join(missing)}"
        )
    there = {"epochs": study.signature.get("epochs"), "imgsz": study.signature.get("image_size")}
    same = {"epochs": old["epochs"] == there["epochs"], "imgsz": _same_side(old["imgsz"], there["imgsz"])}
    differences = [
        f"  {name}: {there[name]} in the study, {old[name]} in the file" for name in old if not same[name]
    ]
    if differences:
        raise UsageError(
            f"{path}: holds trainings whose fitness cannot be compared with those of {study.directory}:\n"
            + "\n".join(differences)
            + "\nImport into a search with the same settings."
        )


def _agreed(options: Path, name: str, written: Any, given: int | None) -> int | None:
    """Return the value of opt.yaml or of the flag; if both exist, they must be equal."""
    if isinstance(written, list) and written:
        written = written[0]
    if isinstance(written, bool) or not isinstance(written, int):
        return given
    if given is not None and given != written:
        raise UsageError(
            f"--{name} {given}: {options} says {written}; leave the flag out, or correct the file"
        )
    return written


def _same_side(old: int | None, here: Any) -> bool:
    """Return whether a requested image side equals the study's side after rounding up to a multiple of the stride."""
    return isinstance(old, int) and any(here in (old, -(-old // stride) * stride) for stride in _STRIDES)


def _limits(
    path: Path, study: SearchStudy, trials: Sequence[FrozenTrial], example: OldResult
) -> dict[str, BaseDistribution]:
    """Return the limits of the study's newest candidate; the file must have a column for every searched value."""
    own = [trial for trial in trials if IMPORTED not in trial.user_attrs]
    if not own:
        raise UsageError(f"{study.directory}: has no candidate yet; start a worker first, then import")
    limits: dict[str, BaseDistribution] = own[-1].distributions
    missing = [name for name in limits if name not in example.hyp]
    if missing:
        raise UsageError(
            f"{path}: has no column for {', '.join(missing)}, which this search changes; not imported"
        )
    return limits


def _why_not(result: OldResult, limits: Mapping[str, BaseDistribution], fixed: Mapping[str, float]) -> str:
    """Return why this search could not have drawn a row; an empty string if it could."""
    for name, value in result.hyp.items():
        limit = limits.get(name)
        if isinstance(limit, FloatDistribution):
            if not limit.low <= value <= limit.high:
                return f"{name}={value:g} lies outside {limit.low:g} to {limit.high:g}, which this search keeps to"
        elif limit is not None:
            return f"{name} is not a plain number in this search"
        elif name in fixed and not math.isclose(value, fixed[name], rel_tol=1e-4, abs_tol=1e-9):
            return f"{name}={value:g}, which is {fixed[name]:g} throughout this search"
    return ""
