"""HTML and SVG from nested calls: whatever is not markup already is escaped, so nothing can be forgotten."""

from __future__ import annotations

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
