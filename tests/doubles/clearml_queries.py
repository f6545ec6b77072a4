"""How the double of a ClearML server looks records up: filters, `order_by`, pages, scrolls and projections."""

from __future__ import annotations

import copy
import hashlib
import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

Record = dict[str, Any]
Body = Mapping[str, Any]

DEFAULT_PAGE = 500
_OPERATORS = ("__$", "__@", "-")


class Selection:
    """Answer `get_all` requests. A scroll remembers what is left of the answer that it began with."""

    def __init__(self) -> None:
        self._scrolls: dict[str, list[Record]] = {}

    def page(self, store: Mapping[str, Record], body: Body, key: str) -> Record:
        """Return the matching records in the order and the page asked for."""
        found = [record for record in store.values() if _matches(record, body)]
        for name in reversed(body.get("order_by") or ["-last_update"]):
            field = name.lstrip("-")
            found.sort(key=lambda record: str(_field(record, field) or ""), reverse=name.startswith("-"))
        total = len(found)
        size = int(body.get("page_size") or body.get("size") or DEFAULT_PAGE)
        if scroll := body.get("scroll_id"):
            found = self._scrolls.get(scroll, [])
        start = int(body.get("page") or 0) * size
        page, rest = found[start : start + size], found[start + size :]
        answer: Record = {key: [projected(record, body) for record in page], "total": total}
        if "size" in body or "scroll_id" in body:
            answer["scroll_id"] = new_id()
            self._scrolls[answer["scroll_id"]] = rest
        return answer


def new_id() -> str:
    return uuid.uuid4().hex


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def digest(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _field(record: Record, path: str) -> Any:
    value: Any = record
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _matches(record: Record, body: Body) -> bool:
    for field in ("id", "project", "status", "type", "parent", "user", "task"):
        wanted = body.get(field)
        if wanted and _field(record, field) not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    name = body.get("name")
    if name and not re.search(name, record.get("name", "")):
        return False
    return all(_holds(record.get(field, []), body.get(field) or []) for field in ("tags", "system_tags"))


def _holds(tags: list[str], wanted: list[str]) -> bool:
    """Return whether `tags` holds all that are wanted and none that `-tag` excludes; operators are passed over."""
    for tag in wanted:
        if tag.startswith("-") and len(tag) > 1:
            if tag[1:] in tags:
                return False
        elif not tag.startswith(_OPERATORS) and tag not in tags:
            return False
    return True


def projected(record: Record, body: Body) -> Record:
    """Return a copy with the fields of `only_fields`, whole branches for dotted ones; all without."""
    wanted = body.get("only_fields")
    if not wanted:
        return copy.deepcopy(record)
    roots = {str(field).partition(".")[0] for field in (wanted if isinstance(wanted, list) else [wanted])}
    return copy.deepcopy({field: value for field, value in record.items() if field in roots | {"id"}})
