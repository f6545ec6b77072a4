"""What a study spends its budget on: candidates, cut short or not, and the best of them once more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from starling.core.errors import ConfigError
from starling.search.pruning import Halving

FRESH_SEEDS = 2
"""Times that a finalist is trained again."""
FINALS_SHARE = 5
"""Finals take at most one training in so many; a search too small for two finalists has none."""


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

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as the study's definition holds them."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from `as_dict()`'s values."""
        return cls(
            epochs=int(values["epochs"]), prune=bool(values["prune"]), finalists=int(values["finalists"])
        )
