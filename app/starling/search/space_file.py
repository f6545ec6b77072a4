"""Read the file that `--space` names: genes with limits and settings with choices, checked against the training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from starling.config.hyp import Hyp
from starling.config.shipped import find_config
from starling.config.yaml_reader import read_yaml
from starling.core.errors import ConfigError, UsageError, suggest
from starling.core.files.refusals import readable
from starling.core.paths import at_home, real_path
from starling.core.settings.train import OPTIMIZERS, TrainConfig
from starling.model.defaults import space_file
from starling.search.space import GENE_KEYS, Gene, SettingGene, Space, settings_flags

SETTINGS: dict[str, type[Any]] = {"batch_size": int, "imgsz": int, "optimizer": str, "cfg": str}
"""Fields of TrainConfig that may be searched besides hyperparameters -> type of their values."""
_HYPS = tuple(field.name for field in fields(Hyp))
_MOST_CHOICES = 64
_EXAMPLES = {
    "batch_size": "[8, 16, 32]",
    "imgsz": "[512, 640]",
    "optimizer": "[SGD, AdamW]",
    "cfg": "[yolov5n.yaml, yolov5s.yaml]",
}


def changed(config: TrainConfig, settings: Mapping[str, int | str]) -> TrainConfig:
    """Return the training with these settings; raises ConfigError for an impossible setting."""
    return replace(config, **settings)  # type: ignore[arg-type]


def read_space(config: TrainConfig) -> tuple[Space, dict[str, int | str]]:
    """Return the space that `--space` names, and the start values of its settings.

    Raises UsageError, with file and key, for an invalid file, and for a searched setting whose start value is
    not among its choices.
    """
    path = space_file(config)
    space = parse_space(read_yaml(path), str(path), config, path.parent)
    return space, {setting.name: _start(setting, config, str(path)) for setting in space.settings}


def parse_space(
    mapping: Mapping[str, Any], source: str, config: TrainConfig, folder: Path | None = None
) -> Space:
    """Return the space that a YAML's content describes; raises UsageError with `source` and the key.

    `config` is the training that settings are checked with: the rules of TrainConfig say which values are possible.
    Names of layouts may be relative to `folder`.
    """
    if folder is not None and isinstance(mapping.get("cfg"), list):
        mapping = {**mapping, "cfg": [_beside(folder, name) for name in mapping["cfg"]]}
    genes, settings = [], []
    for name, item in mapping.items():
        where = f"{source}: {name}"
        if name in SETTINGS:
            settings.append(_setting(name, item, where, config))
        elif name in _HYPS:
            genes.append(_gene(name, item, where))
        else:
            known = (*_HYPS, *SETTINGS)
            raise UsageError(
                f"{where}: neither a hyperparameter nor one of {', '.join(SETTINGS)}{suggest(name, known)}"
            )
    if not genes and not settings:
        raise UsageError(
            f"{source}: names nothing to search; add a line such as `lr0: {{lower: 0.001, upper: 0.1}}`"
        )
    # Sorted, because the random streams run along the axes: two files with another order describe the same space.
    genes.sort(key=lambda gene: _HYPS.index(gene.name))
    settings.sort(key=lambda setting: list(SETTINGS).index(setting.name))
    return Space(tuple(genes), tuple(settings))


def _beside(folder: Path, name: Any) -> Any:
    """Return the absolute path of a layout at `name` relative to `folder`; if there is no such file, `name`."""
    if not isinstance(name, str):
        return name
    path = folder / at_home(name)
    with readable(UsageError):
        return str(real_path(path)) if path.is_file() else name


def _gene(name: str, item: Any, where: str) -> Gene:
    example = f"give {name}: {{lower: …, upper: …}}, or leave it out to keep the hyp's value"
    if not isinstance(item, dict):
        raise UsageError(f"{where}: {item!r} gives no limits; {example}")
    for key in item:
        if key not in GENE_KEYS:
            raise UsageError(f"{where}: unknown key {key!r}{suggest(str(key), GENE_KEYS)}; {example}")
    lower, upper = (_number(item.get(key), f"{where}.{key}", example) for key in ("lower", "upper"))
    gain = _number(item.get("gain", 1), f"{where}.gain", "0 keeps the parent's value, 1 is the classic step")
    log = item.get("log", False)
    if not isinstance(log, bool):
        raise UsageError(f"{where}.log={log!r}: must be true or false")
    if lower >= upper:
        raise UsageError(f"{where}: lower {lower:g} must be below upper {upper:g}; {example}")
    if log and lower <= 0:
        raise UsageError(
            f"{where}: a log scale cannot contain {lower:g}; raise lower above 0, or leave log out"
        )
    if gain < 0:
        raise UsageError(f"{where}.gain={gain:g}: must be 0 or above; 0 keeps the parent's value")
    for bound in (lower, upper):
        try:
            Hyp.from_mapping({name: bound}, where)
        except UsageError as error:
            raise UsageError(f"{error}; no training could be given it") from None
    return Gene(name, gain, lower, upper, log)


def _number(value: Any, where: str, remedy: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise UsageError(f"{where}={value!r}: must be a finite number; {remedy}")
    return float(value)


def _setting(name: str, item: Any, where: str, config: TrainConfig) -> SettingGene:
    choices: Any = _powers_of_two(item, where) if name == "batch_size" and isinstance(item, dict) else item
    kind = SETTINGS[name]
    example = f"give a list such as {name}: {_EXAMPLES[name]}"
    if not isinstance(choices, list) or not choices:
        raise UsageError(f"{where}: {choices!r} gives no choices; {example}")
    for choice in choices:
        if isinstance(choice, bool) or not isinstance(choice, kind):
            words = "a whole number" if kind is int else "a name"
            raise UsageError(f"{where}: {choice!r} is not {words}; {example}")
        _try(name, choice, where, config)
    twice = next((choice for choice in choices if choices.count(choice) > 1), None)
    if twice is not None:
        raise UsageError(f"{where}: {twice!r} stands twice; leave one out")
    if len(choices) == 1:
        flag = settings_flags({name: choices[0]})
        raise UsageError(
            f"{where}: a single choice cannot be searched; give {flag} and leave the setting out here"
        )
    if len(choices) > _MOST_CHOICES:
        raise UsageError(f"{where}: {len(choices)} choices; a search can tell apart {_MOST_CHOICES} at most")
    return SettingGene(name, tuple(sorted(choices) if kind is int else choices))


def _powers_of_two(item: Mapping[str, Any], where: str) -> list[int]:
    """Return the powers of 2 from `lower` to `upper`."""
    example = "give a list of sizes, or {lower: 8, upper: 64} for the powers of 2 between"
    if set(item) != {"lower", "upper"}:
        raise UsageError(f"{where}: has the keys {', '.join(map(str, item)) or 'none'}; {example}")
    lower, upper = (_number(item[key], f"{where}.{key}", example) for key in ("lower", "upper"))
    if not 1 <= lower < upper:
        raise UsageError(f"{where}: lower {lower:g} must be at least 1 and below upper {upper:g}; {example}")
    powers = [2**n for n in range(math.ceil(math.log2(lower)), 31) if 2**n <= upper]
    if not powers:
        raise UsageError(f"{where}: no power of 2 lies from {lower:g} to {upper:g}; {example}")
    return powers


def _try(name: str, choice: int | str, where: str, config: TrainConfig) -> None:
    """Raise UsageError if train.py would refuse this choice."""
    if name == "batch_size" and choice == -1:
        raise UsageError(f"{where}: -1 is no size; give the sizes to try")
    if name == "optimizer" and choice not in OPTIMIZERS:  # TrainConfig leaves this check to the command line
        raise UsageError(
            f"{where}: {choice!r} is none of {', '.join(OPTIMIZERS)}{suggest(str(choice), OPTIMIZERS)}"
        )
    try:
        changed(config, {name: choice})
        if name == "cfg":
            find_config("layouts", str(choice))
    except ConfigError as error:
        raise UsageError(f"{where}: {choice!r} cannot be trained with: {error}") from None
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _start(setting: SettingGene, config: TrainConfig, source: str) -> int | str:
    """Return the choice that equals the setting's value in `config`."""
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
