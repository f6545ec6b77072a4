"""HTML and SVG from nested calls, where whatever is not markup already is escaped; figures as people read them."""

from __future__ import annotations

import math
from html import escape


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Return `value` as HTML text: escaped unless it is markup, control characters left out."""
    if isinstance(value, Markup):
        return value
    plain = str(value)
    if not plain.isprintable():
        plain = "".join(letter if letter.isprintable() else " " for letter in plain)
    return Markup(escape(plain))


def join(*parts: object) -> Markup:
    """Return the parts one after the other."""
    return Markup("".join(map(text, parts)))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element. `_` in an attribute's name is `-`, one at its end is dropped (`class_`); None leaves it out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def void(name: str, /, **attributes: object) -> Markup:
    """Return an element that holds nothing, as `<input>`; in SVG too, where it closes itself."""
    return Markup(element(name, **attributes).removesuffix(f"></{name}>") + "/>")


def number(value: float, digits: int = 4) -> str:
    """Return `value` with so many significant digits, without trailing zeros."""
    return f"{value:.{digits}g}" if math.isfinite(value) else str(value)


def compact(value: float) -> str:
    """Return a count as `950`, `12k`, `3.4M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    """Return a share as `7.3 %`, `42 %`."""
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"
