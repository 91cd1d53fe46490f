"""What rows ask, for what learns from answers of its own: prompts with the other columns of their rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.data.encode import Rendered
from llmkit.data.messages import messages, text
from llmkit.data.node import Data, Readable
from llmkit.data.prepared import Prepared
from llmkit.data.prompted import asking_alone
from llmkit.data.render import Renderer
from llmkit.data.rows import BadRow, Raw, Row, Unusable, introduced
from llmkit.data.shapes import READ, shaped, tools_of
from llmkit.data.usable import NO_PROMPT, Tally, readable

READ_HERE = (*READ, "tools", "cluster")
ANSWER: Mapping[str, Any] = {"role": "assistant", "content": "?"}
"""Stands in the place of an answer that is still to be made."""


@dataclass(frozen=True)
class Asked(Prepared):
    """Prompts of which nothing is trained."""

    columns: Sequence[Mapping[str, Any]] = ()
    """Of each row what is no part of the prompt, for those who judge answers to it; a given answer as `answer`."""


def asked_of(
    sources: Sequence[Readable],
    data: Data,
    tokenizer: Any,
    key: str = "data.train",
    aside: Callable[[BadRow], None] | None = None,
    least: int = 1,
) -> Asked:
    """The prompts of rows with a `prompt` (text or messages), or up to the last answer of those with one; prompts that
    leave no room for an answer in `data.max_length` are left out.

    Raises:
        DataError: a row cannot be read, too many are unusable, or too few are left.
    """
    renderer, tally = Renderer(tokenizer), Tally(data, Counter[str](), aside, counted="prompts")
    found: list[tuple[Raw, Row, Rendered]] = []
    columns: list[Mapping[str, Any]] = []
    for raw, values in readable(sources, tally):
        try:
            row = introduced(asking(values, tally.counts["rows"] - 1), data.system)
            if not row.question:
                raise Unusable("nothing is asked")
            found.append((raw, row, renderer.prompt(row.question, row.tools)))
            columns.append(beside(values, row))
        except Unusable as reason:
            tally.unusable(raw, str(reason))
    made, kept = asking_alone(found, renderer, tally, data, sources, key, least)
    return Asked(**vars(made), columns=[columns[at] for at in kept])


def asking(values: Mapping[str, Any], id: int) -> Row:
    """A row that may have no answer.

    Raises:
        Unusable: with the reason.
    """
    prompt = values.get("prompt")
    if prompt is None or values.get("completion") is not None or values.get("messages") is not None:
        if not any(name in values for name in READ):
            raise Unusable(NO_PROMPT)
        return shaped(values, id)
    cluster, tools = str(values.get("cluster", id)), tools_of(values.get("tools"))
    if isinstance(prompt, str):
        return Row(id, cluster, prompt=text(prompt, "prompt"), tools=tools)
    if not isinstance(prompt, list) or not prompt or not all(isinstance(one, dict) for one in prompt):
        raise Unusable("prompt is no text and no list of messages")
    said, _ = messages([*prompt, ANSWER], 0)
    return Row(id, cluster, (*said[:-1], {"role": "assistant", "content": ""}), len(said) - 1, tools=tools)


def beside(values: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """The columns that are no part of what is asked."""
    rest = {name: value for name, value in values.items() if name not in READ_HERE}
    return {"answer": row.answer} | rest if row.answer else rest
