"""What a search changes: genes within limits and, where asked for, settings of the training; read from a YAML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from starling.config.hyp import Hyp
from starling.config.shipped import find_config
from starling.config.yaml_reader import read_yaml
from starling.core.errors import ConfigError, UsageError, suggest
from starling.core.paths import at_home, real_path
from starling.core.settings.train import OPTIMIZERS, TrainConfig
from starling.errors import readable
from starling.search.space import GENES, Gene, genes_of

Value = float | int | str
"""Of a gene: a float; of a setting: a whole number or text."""
Values = Mapping[str, Value]
"""Name of a gene or setting to its value."""

SETTINGS: dict[str, type[Any]] = {"batch_size": int, "imgsz": int, "optimizer": str, "cfg": str}
"""What may be searched besides hyperparameters: fields of TrainConfig, and what their values are."""
_HYPS = tuple(field.name for field in fields(Hyp))
_GENE_KEYS = ("lower", "upper", "log", "gain")
_MOST_CHOICES = 64


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of the training that is searched: a choice of a few values, near ones beside each other."""

    name: str
    choices: tuple[int | str, ...]

    def at(self, place: float) -> int | str:
        """Return the choice at `place`, from 0 to 1."""
        return self.choices[min(max(int(place * len(self.choices)), 0), len(self.choices) - 1)]

    def place(self, value: Value) -> float:
        """Return the middle of the part of 0 to 1 that `at` takes for `value`."""
        return (self.choices.index(value) + 0.5) / len(self.choices)  # type: ignore[arg-type]


Axis = Gene | Setting


@dataclass(frozen=True, slots=True)
class Space:
    """Genes and settings that a search changes; whatever is not named keeps the value it starts from."""

    genes: tuple[Gene, ...] = GENES
    settings: tuple[Setting, ...] = ()

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Genes, then settings."""
        return (*self.genes, *self.settings)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the axes, in their order."""
        return tuple(axis.name for axis in self.axes)

    def starting_from(self, hyp: Mapping[str, float]) -> Self:
        """Return what of this space a search from `hyp` changes.

        What `hyp` leaves out (`anchors`, unless asked for) is not searched; what it sets to 0 or below is searched on
        a linear scale, as a logarithmic one has no such place for it. Raises UsageError where nothing is left.
        """
        genes = genes_of(hyp, self.genes)
        if not genes and not self.settings:
            raise UsageError("the space leaves nothing to search: name a gene that the hyp has, or a setting")
        return replace(self, genes=tuple(replace(g, log=g.log and hyp[g.name] > 0) for g in genes))

    def distributions(self, seed: Values | None = None) -> dict[str, BaseDistribution]:
        """Return every axis as Optuna describes it; limits are widened where `seed` is given and lies outside them."""
        genes: dict[str, BaseDistribution] = {}
        for gene in self.genes:
            value = gene.lower if seed is None else float(seed[gene.name])
            low, high = min(gene.lower, value), max(gene.upper, value)
            genes[gene.name] = FloatDistribution(low, high, log=gene.log)
        return genes | {setting.name: CategoricalDistribution(setting.choices) for setting in self.settings}

    def understands(self, values: Values) -> bool:
        """Return whether `values` has every axis, and every setting one of its choices; genes may lie outside."""
        chosen = (values[setting.name] in setting.choices for setting in self.settings)
        return all(name in values for name in self.names) and all(chosen)

    def contains(self, values: Values) -> bool:
        """Return whether `values` has every axis, each inside its limits or one of its choices."""
        inside = (gene.lower <= float(values[gene.name]) <= gene.upper for gene in self.genes)
        return self.understands(values) and all(inside)

    def at(self, places: Sequence[float]) -> dict[str, Value]:
        """Return the values at `places`, one from 0 to 1 an axis."""
        return {axis.name: axis.at(place) for axis, place in zip(self.axes, places, strict=True)}

    def places(self, values: Values) -> list[float]:
        """Return where `values` lie, one place from 0 to 1 an axis; what lies outside is taken to the limit."""
        return [axis.place(values[axis.name]) for axis in self.axes]  # type: ignore[arg-type]

    def key(self, values: Values) -> tuple[Value, ...]:
        """Return the values in the order of the axes: equal for equal candidates."""
        return tuple(values[name] for name in self.names)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values: what the workers of a study must agree on."""
        genes: dict[str, Any] = {
            gene.name: {key: getattr(gene, key) for key in _GENE_KEYS} for gene in self.genes
        }
        return genes | {setting.name: list(setting.choices) for setting in self.settings}


def split_values(values: Values) -> tuple[dict[str, float], dict[str, int | str]]:
    """Return hyperparameters and settings of a candidate's values apart."""
    hyp = {name: float(value) for name, value in values.items() if name not in SETTINGS}
    return hyp, {name: value for name, value in values.items() if name in SETTINGS}  # type: ignore[misc]


def changed(config: TrainConfig, settings: Mapping[str, int | str]) -> TrainConfig:
    """Return the training with these settings; raises ConfigError for one that cannot work."""
    return replace(config, **settings)  # type: ignore[arg-type]


def settings_flags(settings: Mapping[str, int | str]) -> str:
    """Return the flags of train.py that ask for these settings; empty for none."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def read_space(config: TrainConfig) -> tuple[Space, dict[str, int | str]]:
    """Return the space that `--space` names, and the settings of it that the search starts from.

    Raises UsageError for a file that is none, naming file and key; and where a setting that is searched starts from
    a value that is not one of its choices.
    """
    path = find_config("spaces", config.space)
    space = parse_space(read_yaml(path), str(path), config, path.parent)
    return space, {setting.name: _start(setting, config, str(path)) for setting in space.settings}


def parse_space(
    mapping: Mapping[str, Any], source: str, config: TrainConfig, folder: Path | None = None
) -> Space:
    """Return the space that a YAML's content describes; raises UsageError naming `source` and the key.

    `config` is the training that settings are tried in: its own rules say which of their values can work. Layouts
    that lie in or below `folder` are named from there.
    """
    if folder is not None and isinstance(mapping.get("cfg"), list):
        mapping = {**mapping, "cfg": [_beside(folder, name) for name in mapping["cfg"]]}
    genes, settings = [], []
    for name, item in mapping.items():
        place = f"{source}: {name}"
        if name in SETTINGS:
            settings.append(_setting(name, item, place, config))
        elif name in _HYPS:
            genes.append(_gene(name, item, place))
        else:
            known = (*_HYPS, *SETTINGS)
            raise UsageError(
                f"{place}: neither a hyperparameter nor one of {', '.join(SETTINGS)}{suggest(name, known)}"
            )
    if not genes and not settings:
        raise UsageError(
            f"{source}: names nothing to search; add a line such as `lr0: {{lower: 0.001, upper: 0.1}}`"
        )
    # In an order of our own, as the random streams run along the axes: two files that differ in it mean the same.
    genes.sort(key=lambda gene: _HYPS.index(gene.name))
    settings.sort(key=lambda setting: list(SETTINGS).index(setting.name))
    return Space(tuple(genes), tuple(settings))


def _beside(folder: Path, name: Any) -> Any:
    """Return the absolute path of a layout that lies at `name` from `folder`, else the name as it is."""
    if not isinstance(name, str):
        return name
    path = folder / at_home(name)
    with readable(UsageError):
        return str(real_path(path)) if path.is_file() else name


def _gene(name: str, item: Any, place: str) -> Gene:
    example = f"give {name}: {{lower: …, upper: …}}, or leave it out to keep the hyp's value"
    if not isinstance(item, dict):
        raise UsageError(f"{place}: {item!r} gives no limits; {example}")
    for key in item:
        if key not in _GENE_KEYS:
            raise UsageError(f"{place}: unknown key {key!r}{suggest(str(key), _GENE_KEYS)}; {example}")
    lower, upper = (_number(item.get(key), f"{place}.{key}", example) for key in ("lower", "upper"))
    gain = _number(item.get("gain", 1), f"{place}.gain", "0 keeps the parent's value, 1 is the classic step")
    log = item.get("log", False)
    if not isinstance(log, bool):
        raise UsageError(f"{place}.log={log!r}: must be true or false")
    if lower >= upper:
        raise UsageError(f"{place}: lower {lower:g} must be below upper {upper:g}; {example}")
    if log and lower <= 0:
        raise UsageError(f"{place}: a log scale has no {lower:g}; raise lower above 0, or leave log out")
    if gain < 0:
        raise UsageError(f"{place}.gain={gain:g}: must be 0 or above; 0 keeps the parent's value")
    for bound in (lower, upper):
        try:
            Hyp.from_mapping({name: bound}, place)
        except UsageError as error:
            raise UsageError(f"{error}; no training could be given it") from None
    return Gene(name, gain, lower, upper, log)


def _number(value: Any, place: str, remedy: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise UsageError(f"{place}={value!r}: must be a finite number; {remedy}")
    return float(value)


def _setting(name: str, item: Any, place: str, config: TrainConfig) -> Setting:
    choices: Any = _powers_of_two(item, place) if name == "batch_size" and isinstance(item, dict) else item
    kind = SETTINGS[name]
    example = f"give a list such as {name}: {_EXAMPLES[name]}"
    if not isinstance(choices, list) or not choices:
        raise UsageError(f"{place}: {choices!r} gives no choices; {example}")
    for choice in choices:
        if isinstance(choice, bool) or not isinstance(choice, kind):
            words = "a whole number" if kind is int else "a name"
            raise UsageError(f"{place}: {choice!r} is not {words}; {example}")
        _try(name, choice, place, config)
    twice = next((choice for choice in choices if choices.count(choice) > 1), None)
    if twice is not None:
        raise UsageError(f"{place}: {twice!r} stands twice; leave one out")
    if len(choices) == 1:
        flag = settings_flags({name: choices[0]})
        raise UsageError(f"{place}: one choice is nothing to search; say {flag} and leave it out here")
    if len(choices) > _MOST_CHOICES:
        raise UsageError(f"{place}: {len(choices)} choices; a search can tell apart {_MOST_CHOICES} at most")
    return Setting(name, tuple(sorted(choices) if kind is int else choices))


_EXAMPLES = {
    "batch_size": "[8, 16, 32]",
    "imgsz": "[512, 640]",
    "optimizer": "[SGD, AdamW]",
    "cfg": "[yolov5n.yaml, yolov5s.yaml]",
}


def _powers_of_two(item: Mapping[str, Any], place: str) -> list[int]:
    """Return the powers of 2 from `lower` to `upper`."""
    example = "give a list of sizes, or {lower: 8, upper: 64} for the powers of 2 between"
    if set(item) != {"lower", "upper"}:
        raise UsageError(f"{place}: has the keys {', '.join(map(str, item)) or 'none'}; {example}")
    lower, upper = (_number(item[key], f"{place}.{key}", example) for key in ("lower", "upper"))
    if not 1 <= lower < upper:
        raise UsageError(f"{place}: lower {lower:g} must be at least 1 and below upper {upper:g}; {example}")
    powers = [2**n for n in range(math.ceil(math.log2(lower)), 31) if 2**n <= upper]
    if not powers:
        raise UsageError(f"{place}: no power of 2 lies from {lower:g} to {upper:g}; {example}")
    return powers


def _try(name: str, choice: int | str, place: str, config: TrainConfig) -> None:
    """Raise UsageError where train.py would refuse this choice."""
    if name == "batch_size" and choice == -1:
        raise UsageError(f"{place}: -1 is no size; give the sizes to try")
    if name == "optimizer" and choice not in OPTIMIZERS:  # TrainConfig leaves that to the command line
        raise UsageError(
            f"{place}: {choice!r} is none of {', '.join(OPTIMIZERS)}{suggest(str(choice), OPTIMIZERS)}"
        )
    try:
        changed(config, {name: choice})
        if name == "cfg":
            find_config("layouts", str(choice))
    except ConfigError as error:
        raise UsageError(f"{place}: {choice!r} cannot be trained with: {error}") from None
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None


def _start(setting: Setting, config: TrainConfig, source: str) -> int | str:
    """Return the choice that the command line's own value of a setting is."""
    given = getattr(config, setting.name)
    for choice in setting.choices:
        if choice == given or (setting.name == "cfg" and given and _same_layout(str(choice), given)):
            return choice
    flag = f"--{setting.name.replace('_', '-')}"
    raise UsageError(
        f"{source}: {setting.name}: the search starts from {flag} {given!r}, which is none of its choices "
        f"{', '.join(map(str, setting.choices))}; give {flag} one of them, or add it there"
    )


def _same_layout(one: str, other: str) -> bool:
    return real_path(find_config("layouts", one)) == real_path(find_config("layouts", other))
