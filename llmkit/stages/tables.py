"""Tables as HTML, and texts as long as a page has room for."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

LETTERS = 2000
"""Of a text in a table of many."""


def shortened(text: str, most: int = LETTERS) -> str:
    """As much of a text as is shown, and how much that leaves out."""
    return text if len(text) <= most else f"{text[:most]} … and {len(text) - most:,} more letters"


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], pre: bool = False) -> str:
    """A titled HTML table; every cell is escaped."""
    wrap = "<pre>{}</pre>" if pre else "{}"
    body = "".join(
        "<tr>" + "".join(f"<td>{wrap.format(html.escape(str(cell)))}</td>" for cell in row) + "</tr>" for row in rows
    )
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f"<h2>{html.escape(title)}</h2><table><tr>{top}</tr>{body}</table>"
