"""What a study is about: what all its workers must agree on, how two of them differ, and how patient they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from starling.core.errors import ConfigError, UsageError
from starling.search.pruning import Halving
from starling.search.space import Space

FRESH_SEEDS = 2
"""Times that a finalist is trained again."""
FINALS_SHARE = 5
"""Finals take at most one training in so many; a search too small for two finalists has none."""
VERSION = 2
"""Of the records of a study; one of another version is refused."""
_DIFFERENCES_SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyPlan:
    """How a study's workers share its budget. Epochs are the unit: a training cut short costs what it ran."""

    epochs: int = 1
    """Of a training of full length."""
    prune: bool = False
    """Whether trainings that fall behind end early."""
    finalists: int = 0
    """The best candidates, to be trained again on fresh seeds before one is named."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.epochs < 1:
            raise ConfigError("epochs", self.epochs, "must be at least 1")
        if self.finalists < 0 or self.finalists == 1:
            raise ConfigError(
                "--finalists", self.finalists, "must be 0 (none) or at least 2, or there is no choice"
            )

    @property
    def halving(self) -> Halving | None:
        """Where trainings are judged on the way; None if they are not."""
        return Halving(self.epochs) if self.prune else None

    def finalists_of(self, budget: int) -> int:
        """Return how many finalists a budget of so many trainings has room for."""
        most = min(self.finalists, budget // (FINALS_SHARE * FRESH_SEEDS))
        return most if most >= 2 else 0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from the plan of a study's definition."""
        return cls(
            epochs=int(values["epochs"]), prune=bool(values["prune"]), finalists=int(values["finalists"])
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySpec:
    """What is searched, from where, and how much of it may be trained."""

    hyp: Mapping[str, float | None]
    """The hyperparameters that the search starts from, searched or not; None: this hyp leaves it out."""
    space: Space
    """What the search may change."""
    settings: Mapping[str, int | str] = field(default_factory=dict)
    """The values that the settings of the space start from."""
    budget: int
    """Trainings of full length in all; a joiner can raise it, never lower it."""
    plan: StudyPlan = field(default_factory=StudyPlan)
    seed: int = 0
    """Of all that is drawn at random."""
    signature: Mapping[str, Any] = field(default_factory=dict)
    """JSON values of what the fitness depends on besides the hyp: a digest of the data, settings of the training."""
    sampler: str = "fast"
    """This worker's own, by its name in `samplers.proposer.SAMPLERS`."""

    def __post_init__(self) -> None:
        """Check the budget."""
        if self.budget < 1:
            raise ConfigError("evolve", self.budget, "must be at least 1 finished training")

    @property
    def start(self) -> dict[str, float]:
        """The hyperparameters that the search starts from, without those that are left out."""
        return {name: float(value) for name, value in self.hyp.items() if value is not None}

    @property
    def searched(self) -> Space:
        """What the search changes: of the space, what the hyp has."""
        return self.space.starting_from(self.start)

    def definition(self) -> dict[str, Any]:
        """Return what all workers must agree on, as it comes back from where it is stored: JSON values only."""
        definition = {
            "version": VERSION,
            "seed": self.seed,
            "hyp": self.start,
            "plan": asdict(self.plan),
            "space": self.searched.as_dict(),
            "signature": dict(self.signature),
        }
        return json.loads(json.dumps(definition, default=str))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRules:
    """How patient the workers of a study are."""

    lease_s: float = 120.0
    """Seconds without a sign of life after which a worker counts as gone."""
    max_retries: int = 2
    """Times that a candidate is tried again after its worker was lost; a finalist's repetition as often as it takes."""
    spare_failures: int = 5
    """Failed candidates beyond the budget at which the search gives up."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.lease_s > 0:
            raise ConfigError("lease_s", self.lease_s, "must be above 0 seconds")
        for name in ("max_retries", "spare_failures"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must be 0 or above")


def check_definition(directory: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise UsageError where a joiner would search for something else than the study does, naming the differences."""
    if there == here:
        return
    check_version(directory, there)
    old, new = _flatten(there), _flatten(here)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = [
        f"  {key}: {old.get(key)!r} in the study, {new.get(key)!r} here" for key in keys[:_DIFFERENCES_SHOWN]
    ]
    if len(keys) > _DIFFERENCES_SHOWN:
        lines.append(f"  and {len(keys) - _DIFFERENCES_SHOWN} more")
    raise UsageError(
        f"{directory}: is a search for something else, and its results cannot be compared with these:\n"
        + "\n".join(lines)
        + "\nGive the same settings to join it, or another --name to start a new one."
    )


def check_version(directory: Path, definition: Mapping[str, Any]) -> None:
    """Raise UsageError for a study whose records are of another version than these."""
    version = definition.get("version")
    if version != VERSION:
        raise UsageError(
            f"{directory}: holds a study of version {version}, and this program works on version {VERSION}; finish it "
            "with the program that began it, or start a search under another --name and import its evolve.csv"
        )


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
