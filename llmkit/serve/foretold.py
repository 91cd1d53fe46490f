"""What a request says of drafts: how many are looked at, what its answer may repeat, and what it is counted by."""

from __future__ import annotations

from typing import Any

from llmkit.inference.speculation.most import MOST
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.prompts import content, tokens_of_text
from llmkit.serve.service import Service

LETTERS = 64
NONE, OTHER = "none", "other"
"""Of requests that name no category, and of those whose category is not counted apart."""


def drafts(fields: Fields) -> int | None:
    """How many drafts of an answer a step looks at, at most: none by `speculation: false`, and by `{tokens: N}` N.

    Raises:
        Refusal: it is neither.
    """
    said = fields.get("speculation")
    if said is None or isinstance(said, bool):
        return 0 if said is False else None
    held = Fields(said, fields.name("speculation"))
    most = held.whole("tokens", None, 0, MOST)
    held.end()
    return most


async def predicted(service: Service, fields: Fields) -> tuple[int, ...]:
    """The tokens of `prediction`, a text that the answer may repeat; none where nothing drafts.

    Raises:
        Refusal: it holds no text, or more than an answer can.
    """
    held = fields.object("prediction")
    if held is None:
        return ()
    held.choice("type", "content", ("content",))
    if held.get("content") is None:
        raise wrong(held.name("content"), "is missing")
    text = content(held)
    held.end()
    if not text or not service.engine.facts.get("speculation"):
        return ()
    ids = await tokens_of_text(service, text, special=False)
    if len(ids) > service.longest:
        raise wrong(held.name("content"), f"has {len(ids)} tokens; the model takes {service.longest}")
    return ids


def category(fields: Fields) -> str:
    """`metadata.category`: the kind of work that a request is counted with.

    Raises:
        Refusal: `metadata` is no object of texts.
    """
    said: Any = fields.get("metadata")
    if said is not None and not (isinstance(said, dict) and all(isinstance(value, str) for value in said.values())):
        raise wrong(fields.name("metadata"), "is not an object of texts")
    named = None if said is None else said.get("category")
    if named in (None, ""):
        return NONE
    return str(named) if len(named) <= LETTERS and named.isprintable() else OTHER


class Categories:
    """The names that are counted apart: so many at most, as they come."""

    def __init__(self, most: int) -> None:
        self.most, self.known = most, {NONE, OTHER}

    def of(self, name: str) -> str:
        """The name under which a category is counted."""
        if name not in self.known and len(self.known) < self.most + 2:
            self.known.add(name)
        return name if name in self.known else OTHER
