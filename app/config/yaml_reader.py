"""Read YAML as plain data, strictly: no objects, no aliases, no duplicate keys, bounded size and depth."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from app.errors import StarlingError, UsageError, readable
from app.outputs.atomic import write_atomic

MAX_BYTES = 256 * 1024
"""Real descriptions stay below 40 KB; what is larger is not a configuration."""
MAX_DEPTH = 32


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 booleans and floats, and without aliases or duplicate keys."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node, refusing aliases and deep nesting before anything is built."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(
                None, None, "aliases (*name) are not accepted; write the value out", event.start_mark
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.constructor.ConstructorError(
                None, None, f"nested deeper than {MAX_DEPTH} levels", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping, refusing a key that stands twice."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain value", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads `no` as False and `1e-3` as text; class names and learning rates mean what they say here.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path, unreadable: type[StarlingError] = UsageError) -> dict[str, Any]:
    """Return the mapping that the YAML file holds.

    Raises `unreadable` for a file that is not there or cannot be read, and UsageError naming file and line for an
    oversized or malformed one, object tags, aliases, duplicate keys, or anything but a mapping with text keys at the top.
    """
    try:
        with readable(unreadable), open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise unreadable(f"{path}: cannot be read: {error.strerror}; check the path") from None
    if len(content) > MAX_BYTES:
        raise UsageError(
            f"{path}: larger than {MAX_BYTES // 1024} KiB, so not a configuration; check the path"
        )
    try:
        value = yaml.load(content.decode("utf-8-sig"), Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: must hold `key: value` lines, found {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise UsageError(f"{path}: the key {key!r} must be text")
    return value


def write_yaml(path: Path, mapping: Mapping[str, Any], *, comment: str = "") -> None:
    """Replace `path` by the mapping as YAML, keys in their order, under an optional comment."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    write_atomic(path, head + yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True))
