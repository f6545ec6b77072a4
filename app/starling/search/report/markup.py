"""Build HTML and SVG from nested calls that escape everything except markup; format figures for people."""

from __future__ import annotations

import math
from html import escape


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Return `value` as HTML text: escaped unless it is markup, with control characters replaced by blanks."""
    if isinstance(value, Markup):
        return value
    plain = str(value)
    if not plain.isprintable():
        plain = "".join(letter if letter.isprintable() else " " for letter in plain)
    return Markup(escape(plain))


def join(*parts: object) -> Markup:
    """Return the concatenated parts."""
    return Markup("".join(map(text, parts)))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element. In attribute names `_` becomes `-`, a final `_` goes (`class_`); None omits an attribute."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def void(name: str, /, **attributes: object) -> Markup:
    """Return an element without content, such as `<input>`; self-closing, as SVG needs."""
    return Markup(element(name, **attributes).removesuffix(f"></{name}>") + "/>")


def number(value: float, digits: int = 4) -> str:
    """Return `value` with `digits` significant digits, without trailing zeros."""
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
