"""Read YAML into plain nodes that know their lines: texts, lists, mappings; no objects, no aliases, bounded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UsageError

MOST_BYTES = 256 * 1024
"""A file of settings stays below 10 KB; what is larger is something else."""
MOST_LEVELS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """A value as it is written: a text, a list, a mapping, or nothing.

    Texts are never turned into numbers or dates here: what `1000:1000` or `1e-3` means is its reader's to say.
    """

    line: int
    text: str | None = None
    quoted: bool = False
    items: tuple[Value, ...] | None = None
    fields: dict[str, Value] | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is said: `key:` or `key: null`."""
        return (
            self.items is None
            and self.fields is None
            and not self.quoted
            and self.text in ("", "~", "null", "Null", "NULL", None)
        )

    @property
    def boolean(self) -> bool | None:
        """The truth that a plain `true` or `false` says; None for anything else."""
        if self.quoted or self.text is None:
            return None
        return {"true": True, "false": False}.get(self.text.lower())

    @property
    def kind(self) -> str:
        """What it is, for messages."""
        return "a list" if self.items is not None else "a mapping" if self.fields is not None else "a text"


def read_mapping(path: Path) -> dict[str, Value]:
    """Return the mapping that a YAML file holds; an empty one for a file of comments only.

    Raises UsageError with file and line for a file that cannot be read or is too large, for anything but one
    document with a mapping, and for tags, anchors, aliases and keys that stand twice.
    """
    from starling.core.plain_yaml import NotYaml, compose_yaml

    content = _read(path)
    try:
        node = compose_yaml(content, path, MOST_LEVELS)
    except NotYaml as error:
        raise UsageError(f"{path}{error.place}: not valid YAML: {error.problem}") from None
    if node is None:
        return {}
    value = _value(node, path)
    if value.empty:
        return {}
    if value.fields is None:
        raise UsageError(f"{path}:{value.line}: must hold `key: value` lines, found {value.kind}")
    return value.fields


def _read(path: Path) -> bytes:
    """Return the bytes of a regular file, never waiting for a pipe."""
    from starling.core.budget import BudgetExceeded
    from starling.core.regular_file import read_regular
    from starling.core.words import printable

    try:
        return read_regular(path, MOST_BYTES)
    except OSError as error:
        raise UsageError(
            f"{printable(path)}: cannot be read, or is not a file ({error.strerror}); give a YAML file"
        ) from None
    except BudgetExceeded:
        raise UsageError(
            f"{path}: over {MOST_BYTES // 1024} KiB, so no file of settings; check the path"
        ) from None


def _value(node: Any, path: Path) -> Value:
    import yaml

    from starling.core.words import shown

    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return Value(line=line, text=node.value, quoted=node.style is not None)
    if isinstance(node, yaml.SequenceNode):
        return Value(line=line, items=tuple(_value(item, path) for item in node.value))
    fields: dict[str, Value] = {}
    for key, value in node.value:
        at = f"{path}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{at}: a key must be a plain word")
        if key.value in fields:
            raise UsageError(f"{at}: the key {shown(repr(key.value))} stands twice; keep one of them")
        fields[key.value] = _value(value, path)
    return Value(line=line, fields=fields)
