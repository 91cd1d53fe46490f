"""What a model is asked, in the tokens that training shows it: the one way from a row or a conversation to a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmkit.core.errors import DataError, ModelError
from llmkit.data.encode import Rendered
from llmkit.data.node import Data, Source
from llmkit.data.order import spread
from llmkit.data.render import Renderer
from llmkit.data.rows import NoTools, Row, Unusable
from llmkit.data.usable import Tally, usable


@dataclass(frozen=True)
class Question:
    """A row, and the tokens of all before its last answer."""

    row: Row
    ids: tuple[int, ...]


def prompt_ids(renderer: Renderer, prompt: str | Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[int]:
    """The tokens of a text, or of a conversation up to where its answer begins; `tools` is what it may call.

    A renderer reads its tokenizer's whole vocabulary once: whoever asks often keeps one.

    Raises:
        ModelError: there are messages and no chat template.
        DataError: it cannot be rendered.
    """
    _check(renderer, prompt)
    return rendered_ids(renderer, prompt, tools)


def continued(
    renderer: Renderer, prompt: str | Sequence[Mapping[str, Any]], completion: str, tools: Sequence[Any] = ()
) -> tuple[list[int], int]:
    """The tokens of a prompt and of a text that follows it, each tokenised apart as in use; and how many are the
    prompt's.

    Raises:
        ModelError, DataError: as `prompt_ids`; or the text holds special tokens.
    """
    _check(renderer, prompt)
    rendered = _prompted(renderer, prompt, tools)
    if renderer.specials.search(completion):
        what = "the completion holds text of special tokens"
        raise DataError(what, fix="give the token ids of both", key="completion")
    before = _ids(renderer, [rendered])[0]
    if not completion:
        return before, len(before)
    cut, anchored = (len(rendered.text), rendered.text) if rendered.text else (1, "\n")
    both = replace(rendered, text=anchored + completion, spans=((cut, cut + len(completion)),), cut=cut)
    ids, weights = renderer.encode([both])[0]
    after = [id for id, weight in zip(ids, weights, strict=True) if weight]
    return before + after, len(before)


def rendered_ids(renderer: Renderer, prompt: str | Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[int]:
    """The same where a missing chat template is the row's own fault.

    Raises:
        DataError: it cannot be rendered.
    """
    return _ids(renderer, [_prompted(renderer, prompt, tools)])[0]


def _check(renderer: Renderer, prompt: str | Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(prompt, str) and not renderer.tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template", fix="give text, or set model.template", key="model.template"
        )


def _prompted(renderer: Renderer, prompt: str | Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> Rendered:
    try:
        return renderer.prompt(prompt, tools)
    except NoTools as reason:
        fix = "ask without tools, or give a template that shows them (model.template)"
        raise DataError("the model's chat template shows no tools", fix=fix, key="tools") from reason
    except Unusable as reason:
        raise DataError(f"the prompt cannot be rendered: {reason}", fix="write another prompt") from reason


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
