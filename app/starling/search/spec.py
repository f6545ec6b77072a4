"""The definition of a study, on which all its workers must agree, and how definitions are compared."""

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
"""Number of times that a finalist is trained again."""
FINALS_SHARE = 5
"""Finals take at most one training in this many; a search too small for two finalists has no finals."""
VERSION = 2
"""Version of a study's records; other versions are refused."""
_DIFFERENCES_SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyPlan:
    """How a study's workers spend its budget. Epochs are the unit: a pruned training costs the epochs that it ran."""

    epochs: int = 1
    """Number of epochs of a training of full length."""
    prune: bool = False
    """Whether trainings that fall behind end early."""
    finalists: int = 0
    """Number of the best candidates that are trained again on fresh seeds before the winner is named."""

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
        """The halving that judges trainings before their end; None without pruning."""
        return Halving(self.epochs) if self.prune else None

    def finalists_of(self, budget: int) -> int:
        """Return the number of finalists for a budget of `budget` trainings."""
        most = min(self.finalists, budget // (FINALS_SHARE * FRESH_SEEDS))
        return most if most >= 2 else 0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from the plan in a study's definition."""
        return cls(
            epochs=int(values["epochs"]), prune=bool(values["prune"]), finalists=int(values["finalists"])
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySpec:
    """What is searched, from which start, and with which budget."""

    hyp: Mapping[str, float | None]
    """The hyperparameters that the search starts from, searched or not; None for one that this hyp leaves out."""
    space: Space
    """The space of the search."""
    settings: Mapping[str, int | str] = field(default_factory=dict)
    """Start values of the settings in the space."""
    budget: int
    """Total number of trainings of full length; a joining worker can raise it, never lower it."""
    plan: StudyPlan = field(default_factory=StudyPlan)
    seed: int = 0
    """Seed of all random draws."""
    signature: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that the fitness depends on besides the hyp: digests of the data, settings of the training."""
    sampler: str = "fast"
    """Sampler of this worker, by its name in `samplers.proposer.SAMPLERS`."""

    def __post_init__(self) -> None:
        """Check the budget."""
        if self.budget < 1:
            raise ConfigError("evolve", self.budget, "must be at least 1 finished training")

    @property
    def start(self) -> dict[str, float]:
        """The hyperparameters that the search starts from, without those that are None."""
        return {name: float(value) for name, value in self.hyp.items() if value is not None}

    @property
    def searched(self) -> Space:
        """The part of the space that the search changes: the axes that the hyp has."""
        return self.space.starting_from(self.start)

    def definition(self) -> dict[str, Any]:
        """Return what all workers must agree on, in the form in which the storage returns it: JSON values only."""
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
    """How long the workers of a study wait, and how often they try again."""

    lease_s: float = 120.0
    """Seconds without a beat after which a worker counts as gone."""
    max_retries: int = 2
    """Number of retries of a candidate after its worker was lost; the repetition of a finalist has no limit."""
    spare_failures: int = 5
    """Number of failed candidates above the budget at which the search gives up."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.lease_s > 0:
            raise ConfigError("lease_s", self.lease_s, "must be above 0 seconds")
        for name in ("max_retries", "spare_failures"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must be 0 or above")


def check_definition(directory: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise UsageError, with the differences, if the definition of a joining worker differs from the study's."""
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
    """Raise UsageError for a study whose records have another version."""
    version = definition.get("version")
    if version != VERSION:
        raise UsageError(
            f"{directory}: holds a study of version {version}, and this program works on version {VERSION}; finish it "
            "with the program that began it, or start a search under another --name and import its evolve.csv"
        )


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
