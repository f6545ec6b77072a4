"""Read YAML into plain nodes that know their lines: texts, lists, mappings; no objects, no aliases, bounded."""

from __future__ import annotations

import os
import stat
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
    import yaml

    content = _read(path)
    try:
        node = yaml.compose(content, Loader=_strict_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if node is None:
        return {}
    value = _value(node, path)
    if value.empty:
        return {}
    if value.fields is None:
        raise UsageError(f"{path}:{value.line}: must hold `key: value` lines, found {value.kind}")
    return value.fields


def _read(path: Path) -> str:
    """Return the text of a regular file, never waiting for a pipe."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{path}: is not a file; give a YAML file")
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if len(content) > MOST_BYTES:
        raise UsageError(f"{path}: over {MOST_BYTES // 1024} KiB, so no file of settings; check the path")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8 text; save it as UTF-8") from None


def _strict_loader() -> type[Any]:
    """Return SafeLoader without anchors, aliases, tags and deep nesting; made here, so that yaml loads late."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        levels = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            problem = None
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                problem = "anchors and aliases (&name, *name) are not accepted; write the value out"
            elif getattr(event, "tag", None):
                problem = "tags (!name) are not accepted; write a plain value"
            elif self.levels >= MOST_LEVELS:
                problem = f"nested deeper than {MOST_LEVELS} levels"
            if problem:
                raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
            self.levels += 1
            node = super().compose_node(parent, index)
            self.levels -= 1
            return node

    return StrictLoader


def _value(node: Any, path: Path) -> Value:
    import yaml

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
            raise UsageError(f"{at}: the key {key.value!r} stands twice; keep one of them")
        fields[key.value] = _value(value, path)
    return Value(line=line, fields=fields)
