"""One account of what a command passes over: the console, the report and `--json` say the same of it."""

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
    """The file that was passed over first."""
    count: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """How many of which kind, where the entry tells kinds apart; by suffix, for example."""


class LeftOut:
    """Count what is passed over, by reason, in the order in which the reasons came up."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def add(
        self, reason: str, path: str | PathLike[str], remedy: str, *, count: int = 1, kind: str = ""
    ) -> None:
        """Count `count` things that are left out for one reason, a noun in the plural: `images that are damaged`.

        `path` is what a reader is shown as an example, `kind` a part of the reason to count by.
        """
        if count <= 0:
            return
        entry = self._entries.setdefault(reason, _Entry(remedy, fspath(path)))
        entry.count += count
        if kind:
            entry.kinds[kind] += count

    def add_unread_image(self, path: str | PathLike[str]) -> None:
        """Count an image of a kind that is not read (`UNREAD_IMAGE_SUFFIXES`), by its suffix."""
        self.add(UNREAD_IMAGES, path, "convert them to JPEG or PNG", kind=suffix_of(fspath(path)))

    def update(self, others: Iterable[LeftOut]) -> None:
        """Add what other accounts hold."""
        for other in others:
            for reason, entry in other._entries.items():
                own = self._entries.setdefault(reason, _Entry(entry.remedy, entry.first))
                own.count += entry.count
                own.kinds.update(entry.kinds)

    def __len__(self) -> int:
        """Return how many things are left out."""
        return sum(entry.count for entry in self._entries.values())

    def lines(self) -> list[str]:
        """Return one line of text for each reason: how many, of which kinds, the first, and the remedy."""
        return [
            f"left out: {reason}: {_counted(entry)}, first {entry.first}; {entry.remedy}"
            for reason, entry in self._entries.items()
        ]

    def findings(self) -> list[Finding]:
        """Return the same as rows of a report."""
        return [
            Finding(entry.first, None, f"left out: {reason}: {_counted(entry)}, this one first", entry.remedy)
            for reason, entry in self._entries.items()
        ]

    def as_list(self) -> list[dict[str, Any]]:
        """Return the same for `--json`: reason, count, kinds, first, remedy."""
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
