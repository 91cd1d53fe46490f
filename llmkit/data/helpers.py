"""The chunks of a source in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from llmkit.data.chunk import ROWS, Chunk, Law, chunk
from llmkit.data.render import Renderer
from llmkit.data.rows import BadRow, Raw


def chunks(rows: Iterable[Raw | BadRow], law: Law, renderer: Renderer) -> Iterator[Chunk]:
    """All examples of `rows`, some hundred rows at a time.

    Raises:
        DataError: a row cannot be read and is not to be set aside.
    """
    found, base = iter(rows), 0
    while here := list(islice(found, ROWS)):
        yield chunk(here, base, law, renderer)
        base += len(here)
