"""The account of everything that a command leaves out; console, report and `--json` show the same account."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

from starling.core.files.kinds import suffix_of
from starling.data.dataset.findings import Finding

UNREAD_IMAGES = "images of a kind that is not read"


@dataclass(slots=True)
class _Entry:
    remedy: str
    first: str
    """The first left-out file."""
    count: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Counts by kind, for example by suffix, if the entry has kinds."""


class LeftOut:
    """Count left-out things by reason, in the order of the first occurrence of each reason."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def add(
        self, reason: str, path: str | PathLike[str], remedy: str, *, count: int = 1, kind: str = ""
    ) -> None:
        """Count `count` things that are left out for one reason, a plural noun: `images that are damaged`.

        `path` is an example for the reader, `kind` a subdivision of the reason to count by.
        """
        if count <= 0:
            return
        entry = self._entries.setdefault(reason, _Entry(remedy, fspath(path)))
        entry.count += count
        if kind:
            entry.kinds[kind] += count

    def add_unread_image(self, path: str | PathLike[str]) -> None:
        """Count an image in a format that is not read (`UNREAD_IMAGE_SUFFIXES`), by its suffix."""
        self.add(UNREAD_IMAGES, path, "convert them to JPEG or PNG", kind=suffix_of(fspath(path)))

    def update(self, others: Iterable[LeftOut]) -> None:
        """Add the counts of other accounts."""
        for other in others:
            for reason, entry in other._entries.items():
                own = self._entries.setdefault(reason, _Entry(entry.remedy, entry.first))
                own.count += entry.count
                own.kinds.update(entry.kinds)

    def __len__(self) -> int:
        """Return how many things are left out."""
        return sum(entry.count for entry in self._entries.values())

    def lines(self) -> list[str]:
        """Return one line of text for each reason: count, kinds, first example, remedy."""
        return [
            f"left out: {reason}: {_counted(entry)}, first {entry.first}; {entry.remedy}"
            for reason, entry in self._entries.items()
        ]

    def findings(self) -> list[Finding]:
        """Return the account as rows of a report."""
        return [
            Finding(entry.first, None, f"left out: {reason}: {_counted(entry)}, this one first", entry.remedy)
            for reason, entry in self._entries.items()
        ]

    def as_list(self) -> list[dict[str, Any]]:
        """Return the account for `--json`: reason, count, kinds, first, remedy."""
        return [
            {
                "reason": reason,
                "count": entry.count,
                "kinds": dict(entry.kinds),
                "first": entry.first,
                "remedy": entry.remedy,
            }
            for reason, entry in self._entries.items()
        ]


def _counted(entry: _Entry) -> str:
    if not entry.kinds:
        return f"{entry.count}"
    return f"{entry.count} ({', '.join(f'{kind} {number}' for kind, number in entry.kinds.most_common())})"
