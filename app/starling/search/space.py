"""The search space: hyperparameters (genes) within limits, and settings of the training with a few choices each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from starling.core.errors import UsageError

Value = float | int | str
"""Value of a gene: a float; of a setting: a whole number or a string."""
Values = Mapping[str, Value]
"""Name of a gene or setting -> its value."""
GENE_KEYS = ("lower", "upper", "log", "gain")
"""Properties of a gene in a space file; all workers of a study must agree on them."""

DIGITS = 5
"""Significant digits of a proposed value within a gene's limits: finer than fitness can resolve, and short to read."""


@dataclass(frozen=True, slots=True)
class Gene:
    """One hyperparameter of the search."""

    name: str
    gain: float
    """Strength of the mutations in the classic sampler; 0 keeps the parent's value. Other samplers ignore it."""
    lower: float
    upper: float
    log: bool = False
    """Whether the scale is logarithmic. The classic step multiplies in either case."""

    def clamp(self, value: float) -> float:
        """Return `value` clipped to the limits and rounded to five decimals, as in the classic step."""
        return min(max(round(value, 5), self.lower), self.upper)

    def at(self, position: float) -> float:
        """Return the value at `position`, from 0 (lower limit) to 1 (upper limit), rounded to a readable value."""
        if position <= 0:
            return self.lower
        if position >= 1:
            return self.upper
        width = self.upper - self.lower
        if self.log:
            low, high = math.log(self.lower), math.log(self.upper)
            value = math.exp(low + (high - low) * position)
            width = min(width, value)
        else:
            value = self.lower + width * position
        rounded = round(value, DIGITS - 1 - math.floor(math.log10(width)))
        return min(max(rounded, self.lower), self.upper)

    def position(self, value: float) -> float:
        """Return the position of `value` between the limits, from 0 to 1: the inverse of `at`, except for rounding."""
        value = min(max(value, self.lower), self.upper)
        if self.log:
            low, high = math.log(self.lower), math.log(self.upper)
            return (math.log(value) - low) / (high - low)
        return (value - self.lower) / (self.upper - self.lower)


@dataclass(frozen=True, slots=True)
class SettingGene:
    """One searched setting of the training: a choice of a few values, similar values next to each other."""

    name: str
    choices: tuple[int | str, ...]

    def at(self, position: float) -> int | str:
        """Return the choice at `position`, from 0 to 1."""
        return self.choices[min(max(int(position * len(self.choices)), 0), len(self.choices) - 1)]

    def position(self, value: Value) -> float:
        """Return the middle of the interval of positions that `at` maps to `value`."""
        return (self.choices.index(value) + 0.5) / len(self.choices)  # type: ignore[arg-type]


Axis = Gene | SettingGene


@dataclass(frozen=True, slots=True)
class Space:
    """The genes and settings that a search changes; all other values stay as at the start."""

    genes: tuple[Gene, ...]
    settings: tuple[SettingGene, ...] = ()

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The genes, then the settings."""
        return (*self.genes, *self.settings)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes, in their order."""
        return tuple(axis.name for axis in self.axes)

    def starting_from(self, hyp: Mapping[str, float]) -> Self:
        """Return the part of this space that a search starting from `hyp` changes.

        A gene that is missing in `hyp` (such as `anchors`), or with equal limits, is not searched. A gene that
        `hyp` sets to 0 or below is searched on a linear scale, because a logarithmic scale has no such position. Raises
        UsageError if nothing is left to search.
        """
        genes = [gene for gene in self.genes if gene.name in hyp and gene.lower < gene.upper]
        if not genes and not self.settings:
            raise UsageError("the space leaves nothing to search: name a gene that the hyp has, or a setting")
        return replace(self, genes=tuple(replace(g, log=g.log and hyp[g.name] > 0) for g in genes))

    def distributions(self, seed: Values | None = None) -> dict[str, BaseDistribution]:
        """Return every axis as an Optuna distribution; limits are widened to include `seed`, if given."""
        genes: dict[str, BaseDistribution] = {}
        for gene in self.genes:
            value = gene.lower if seed is None else float(seed[gene.name])
            low, high = min(gene.lower, value), max(gene.upper, value)
            genes[gene.name] = FloatDistribution(low, high, log=gene.log)
        return genes | {setting.name: CategoricalDistribution(setting.choices) for setting in self.settings}

    def understands(self, values: Values) -> bool:
        """Return whether `values` has every axis, and valid choices of all settings; genes may exceed their limits."""
        chosen = (values[setting.name] in setting.choices for setting in self.settings)
        return all(name in values for name in self.names) and all(chosen)

    def contains(self, values: Values) -> bool:
        """Return whether `values` has every axis, with genes inside their limits and valid choices for all settings."""
        inside = (gene.lower <= float(values[gene.name]) <= gene.upper for gene in self.genes)
        return self.understands(values) and all(inside)

    def at(self, positions: Sequence[float]) -> dict[str, Value]:
        """Return the values at `positions`, one position from 0 to 1 per axis."""
        return {axis.name: axis.at(position) for axis, position in zip(self.axes, positions, strict=True)}

    def positions(self, values: Values) -> list[float]:
        """Return the positions of `values`, from 0 to 1 per axis; values outside the limits are clipped."""
        return [axis.position(values[axis.name]) for axis in self.axes]  # type: ignore[arg-type]

    def key(self, values: Values) -> tuple[Value, ...]:
        """Return the values in the order of the axes; equal candidates have equal keys."""
        return tuple(values[name] for name in self.names)

    def as_dict(self) -> dict[str, Any]:
        """Return the space as plain values, for the definition that all workers of a study must agree on."""
        genes: dict[str, Any] = {
            gene.name: {key: getattr(gene, key) for key in GENE_KEYS} for gene in self.genes
        }
        return genes | {setting.name: list(setting.choices) for setting in self.settings}


def split_values(
    values: Values, limits: Mapping[str, BaseDistribution]
) -> tuple[dict[str, float], dict[str, int | str]]:
    """Split a candidate's values into hyperparameters and settings; settings are the values with categorical limits."""
    settings = [name for name in values if isinstance(limits.get(name), CategoricalDistribution)]
    hyp = {name: float(value) for name, value in values.items() if name not in settings}
    return hyp, {name: values[name] for name in settings}  # type: ignore[misc]


def settings_flags(settings: Mapping[str, int | str]) -> str:
    """Return the flags of train.py for these settings; an empty string for no settings."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
