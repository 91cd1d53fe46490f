"""What a model is asked, in the tokens that training shows it: the one way from a row or a conversation to a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.core.errors import DataError, ModelError
from llmkit.data.encode import Rendered
from llmkit.data.node import Data, Source
from llmkit.data.order import spread
from llmkit.data.render import Renderer
from llmkit.data.rows import Row, Unusable
from llmkit.data.usable import Tally, usable


@dataclass(frozen=True)
class Question:
    """A row, and the tokens of all before its last answer."""

    row: Row
    ids: tuple[int, ...]


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
    """The tokens of a text, or of a conversation up to where its answer begins.

    Raises:
        ModelError: there are messages and no chat template.
        DataError: it cannot be rendered.
    """
    if not isinstance(prompt, str) and not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template", fix="give text, or set model.template", key="model.template"
        )
    return rendered_ids(Renderer(tokenizer), prompt)


def rendered_ids(renderer: Renderer, prompt: str | Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[int]:
    """The same by a renderer that is there already, with what may be called.

    Raises:
        DataError: it cannot be rendered.
    """
    try:
        rendered = renderer.prompt(prompt, tools)
    except Unusable as reason:
        raise DataError(f"the prompt cannot be rendered: {reason}", fix="write another prompt") from reason
    return _ids(renderer, [rendered])[0]


def asked(rows: Sequence[Row], tokenizer: Any, most: int) -> list[Question]:
    """At most `most` of the rows that ask something, from all over them."""
    renderer = Renderer(tokenizer)
    kept: list[tuple[Row, Rendered]] = []
    able = [index for index, row in enumerate(rows) if row.question] if most else []  # rows may lie on the disk
    for row in (rows[able[i]] for i in spread(len(able), most)):
        try:
            kept.append((row, _prompt(renderer, row)))
        except Unusable:
            continue  # it can be trained on, and this is no account of rows
    return _questions(renderer, kept)


def questions(sources: Sequence[Source], tokenizer: Any, key: str, most: int | None = None) -> list[Question]:
    """Questions from all over `sources`, all of which are read, so that every task refuses the same files.

    Raises:
        DataError: a row cannot be read, too many are unusable, or none asks anything.
    """
    renderer = Renderer(tokenizer)
    kept: list[tuple[Row, Rendered]] = []
    tally = Tally(Data(train=tuple(sources)), Counter[str]())
    for raw, row in usable(sources, tally):
        try:
            kept.append((row, _prompt(renderer, row)))
        except Unusable as reason:
            tally.unusable(raw, str(reason))
    tally.check(len(kept), 1, key)
    return _questions(renderer, [kept[i] for i in spread(len(kept), most)])


def _prompt(renderer: Renderer, row: Row) -> Rendered:
    if not row.question:
        raise Unusable("nothing is asked")
    return renderer.prompt(row.question, row.tools)


def _questions(renderer: Renderer, kept: Sequence[tuple[Row, Rendered]]) -> list[Question]:
    made = _ids(renderer, [rendered for _, rendered in kept])
    return [Question(row, tuple(ids)) for (row, _), ids in zip(kept, made, strict=True)]


def _ids(renderer: Renderer, rendered: Sequence[Rendered]) -> list[list[int]]:
    """Of nothing at all, the token that a text begins or ends with: a model needs one."""
    tokenizer = renderer.tokenizer
    first = [id for id in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if id is not None][:1]
    return [ids or first for ids, _ in renderer.encode(rendered)]
