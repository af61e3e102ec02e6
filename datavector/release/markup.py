"""HTML and SVG from plain functions: every text is escaped on its way in, unless it is markup already."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Html(str):
    """Markup, which is not escaped again."""

    __slots__ = ()


def html(content: object) -> Html:
    """Markup as it is; any other content as text, escaped."""
    return content if isinstance(content, Html) else Html(escape(str(content)))


def join(parts: Iterable[object]) -> Html:
    """Parts one after the other, each as `html` makes it."""
    return Html("".join(html(part) for part in parts))


def element(tag: str, *content: object, **attributes: object) -> Html:
    """One element with its content.

    Args:
        content: texts and markup, in order.
        attributes: by name, with `_` for `-` (a trailing one, as in `class_`, is dropped); None leaves one out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{written}>{join(content)}</{tag}>")
