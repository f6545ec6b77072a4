"""Read untrusted YAML as plain data: no objects, no aliases, no duplicate keys, limited depth, and one kind of error.

PyYAML may raise any exception for a value that does not fit its tag (`!!timestamp x`), builds integers of any length,
and expands merge keys and aliases without limit. Both packages read YAML with the functions here.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from starling.core.utf8 import NotUtf8, text_of
from starling.core.words import shown

MOST_BYTES = 256 * 1024
"""The largest file; real files of settings and descriptions stay below 40 KB."""
MAX_LEVELS = 32
_MOST_WRITTEN_LEVELS = 16
_MOST_WHOLE_BITS = 64
_MOST_WHOLE_CHARACTERS = 80
"""64 binary digits with underscores; a conversion takes time quadratic in the length."""
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class NotYaml(Exception):
    """The content is no plain YAML; has the problem in words, and the line (from 1) if known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line

    @property
    def place(self) -> str:
        """The line as a suffix of a path: `:7`; empty if unknown."""
        return "" if self.line is None else f":{self.line}"


class OtherYaml(NotYaml):
    """The content is valid YAML, but not of the expected form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """A value as written in the file: a text, a list, a mapping, or nothing.

    Texts are not converted to numbers or dates; the caller decides what `1000:1000` or `1e-3` means.
    """

    line: int
    text: str | None = None
    quoted: bool = False
    items: tuple[Value, ...] | None = None
    fields: dict[str, Value] | None = None

    @property
    def empty(self) -> bool:
        """Whether the value is missing: `key:` or `key: null`."""
        return (
            self.items is None
            and self.fields is None
            and not self.quoted
            and self.text in ("", "~", "null", "Null", "NULL", None)
        )

    @property
    def boolean(self) -> bool | None:
        """The value of a plain `true` or `false`; None for anything else."""
        if self.quoted or self.text is None:
            return None
        return {"true": True, "false": False}.get(self.text.lower())

    @property
    def kind(self) -> str:
        """The kind of the value, for messages."""
        return "a list" if self.items is not None else "a mapping" if self.fields is not None else "a text"


def load_mapping(content: bytes, path: Path | str = "FILE") -> dict[str, Any]:
    """Return the mapping in a file of at most MOST_BYTES; all keys are text. Raises NotYaml."""
    if len(content) > MOST_BYTES:
        raise OtherYaml(f"larger than {MOST_BYTES // 1024} KiB, so not a configuration; check the path")
    value = load_yaml(content, path)
    if not isinstance(value, dict):
        raise OtherYaml(f"must hold `key: value` lines, found {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise OtherYaml(f"the key {shown(repr(key))} must be text")
    return value


def written_mapping(content: bytes, path: Path | str = "FILE") -> dict[str, Value]:
    """Return the mapping in a file as written, with line numbers; empty for comments only. Raises NotYaml."""
    node = compose_yaml(content, path, _MOST_WRITTEN_LEVELS)
    value = None if node is None else _written(node)
    if value is None or value.empty:
        return {}
    if value.fields is None:
        raise OtherYaml(f"must hold `key: value` lines, found {value.kind}", value.line)
    return value.fields


def _written(node: Any) -> Value:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return Value(line=line, text=node.value, quoted=node.style is not None)
    if isinstance(node, yaml.SequenceNode):
        return Value(line=line, items=tuple(map(_written, node.value)))
    fields: dict[str, Value] = {}
    for key, value in node.value:
        key_line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise OtherYaml("a key must be a plain word", key_line)
        if key.value in fields:
            raise OtherYaml(f"the key {shown(repr(key.value))} appears twice; keep one of them", key_line)
        fields[key.value] = _written(value)
    return Value(line=line, fields=fields)


def load_yaml(content: bytes, path: Path | str = "FILE") -> Any:
    """Return the value of a file with one document; booleans and floats are read as in YAML 1.2. Raises NotYaml."""
    return _read(content, path, _PlainLoader, lambda loader: loader.get_single_data())


def compose_yaml(content: bytes, path: Path | str = "FILE", levels: int = MAX_LEVELS) -> Any:
    """Return PyYAML's root node of a single document, or None; accepts no tags and no anchors. Raises NotYaml."""

    def compose(loader: _BareLoader) -> Any:
        loader.most_levels = levels
        return loader.get_single_node()

    return _read(content, path, _BareLoader, compose)


def _read(content: bytes, path: Path | str, kind: type[Any], take: Any) -> Any:
    try:
        return take(kind(text_of(content, path)))
    except NotUtf8 as error:
        raise NotYaml(str(error)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = shown(error.problem or error.context)
        if "escape" in words:
            words += r"; write / in place of \, or single quotes"
        raise NotYaml(words, mark.line + 1 if mark else None) from None
    except (
        Exception
    ) as error:  # PyYAML lets other exceptions through: for escapes like "\UFFFFFFFF", for depth
        raise NotYaml(f"not readable as YAML: {shown(error)}") from None


class _Refused(yaml.constructor.ConstructorError):
    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(None, None, problem, mark)


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 booleans and floats, without aliases and duplicate keys."""

    level = 0
    most_levels = MAX_LEVELS

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node; refuses aliases and deep nesting before it builds a value."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._look_at(event)
        if self.level >= self.most_levels:
            raise _Refused(f"nested deeper than {self.most_levels} levels", event.start_mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        if isinstance(node, yaml.ScalarNode) and _NO_TEXT.search(node.value):
            raise _Refused("a character that no text has (NUL, or half of a pair)", node.start_mark)
        return node

    def _look_at(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent):
            raise _Refused("aliases (*name) are not accepted; write the value out", event.start_mark)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Construct one value; refuses a value that does not fit its tag, with its line."""
        try:
            value = super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        except yaml.YAMLError:
            raise
        except Exception:
            _refuse(node, f"is no {node.tag.rpartition(':')[2]}")
        if type(value) is int and value.bit_length() > _MOST_WHOLE_BITS:
            _refuse(node, f"is a whole number beyond the limit of {_MOST_WHOLE_BITS} bits")
        return value

    def construct_yaml_int(self, node: Any) -> Any:
        """Construct an integer; refuses one with too many characters."""
        if isinstance(node, yaml.ScalarNode) and len(node.value) > _MOST_WHOLE_CHARACTERS:
            _refuse(node, f"is a whole number beyond the limit of {_MOST_WHOLE_BITS} bits")
        return super().construct_yaml_int(node)  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping; refuses duplicate keys."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _Refused("a key must be a plain value", key_node.start_mark)
            if key in seen:
                raise _Refused(f"the key {shown(repr(key))} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refuse(node: Any, problem: str) -> NoReturn:
    """Raise an error that quotes the line, because the value alone does not show its key."""
    mark = node.start_mark
    line = str(mark.buffer)[mark.pointer - mark.column :] if mark.buffer else node.value
    raise _Refused(f"`{shown(line.rstrip(chr(0)), 40)}` {problem}", mark)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
# YAML 1.1 reads `no` as False and `1e-3` as text, which breaks class names and learning rates.
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


class _BareLoader(_PlainLoader):
    """The same loader without anchors and tags, for callers that need texts as written."""

    def _look_at(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused(
                "anchors and aliases (&name, *name) are not accepted; write the value out", event.start_mark
            )
        if getattr(event, "tag", None):
            raise _Refused("tags (!name) are not accepted; write a plain value", event.start_mark)
