"""HTML and SVG from Python calls, with every text escaped unless it was made here.

Records, replies and names in a report come from anywhere. A plain `str` is therefore always text; only
`Markup`, which `text`, `tag` and `join` make, is put into the page as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

# What a control character means in HTML depends on the parser; shown instead of passed on.
_UNPRINTABLE = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127), "�")
_VOID = ("br", "meta", "circle", "line", "path", "rect", "polyline", "polygon")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | Markup | None


def text(value: object) -> Markup:
    """Any value as escaped text."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(str(value).translate(_UNPRINTABLE), quote=True))


def join(children: Iterable[Child]) -> Markup:
    """Several pieces after one another; None leaves nothing."""
    return Markup("".join(text(child) for child in children if child is not None))


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element. In attributes `class_` is class, `_` is `-`; None and False are left out, True is bare."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        assert not children, f"<{name}> has no content"
        return Markup(f"<{name}{written}>" if name in ("br", "meta") else f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")
