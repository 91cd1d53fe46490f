"""Answers as a reward model reads them: whole, each scored at its last token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmkit.data.encode import Rendered
from llmkit.data.groups import Groups, grouped
from llmkit.data.node import Data, Readable
from llmkit.data.render import Renderer
from llmkit.data.rows import BadRow, Row

Array = np.ndarray[Any, Any]
END = 0
"""Stands behind each answer as the token that its last one is read for; no model ever sees it."""


def judged(
    sources: Sequence[Readable],
    data: Data,
    tokenizer: Any,
    key: str = "data.train",
    aside: Callable[[BadRow], None] | None = None,
    least: int = 1,
    counted: str = "rows",
) -> Groups:
    """All examples of `sources`, at least `least` of them: prompts with their answers, of which `per["length"]` says
    how many tokens each has.

    Raises:
        DataError: a row cannot be read, too many are unusable, or too few are left.
    """
    return at_ends(grouped(sources, data, tokenizer, key, aside, least, whole, counted), padding(tokenizer))


def whole(renderer: Renderer, row: Row) -> Rendered:
    """A row as the template writes all of it: its answer goes on to the end of the text, whatever stands there."""
    rendered = renderer.render(row)
    if not row.messages or not rendered.spans:
        return rendered
    text = renderer.whole(row.messages, row.tools).text
    return replace(rendered, text=text, spans=((rendered.spans[0][0], len(text)),), close=False, weights=())


def padding(tokenizer: Any) -> int | None:
    """The token that fills rows up: the end token where the tokenizer names none."""
    end: int | None = tokenizer.eos_token_id
    return end if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def answer_ids(renderer: Renderer, rows: Sequence[Row]) -> list[list[int]]:
    """The tokens of each row up to where its answer is scored, as `judged` has them.

    Raises:
        Unusable: a row cannot be rendered.
        DataError: there are messages and no chat template.
    """
    pad, made = padding(renderer.tokenizer), renderer.encode([whole(renderer, row) for row in rows])
    return [ids[: _last(ids, 0, len(ids), pad)] for ids, _ in made]


def at_ends(groups: Groups, pad: int | None) -> Groups:
    """The same answers, each read at the last of its tokens that does not fill rows up, where transformers reads it.

    A branch holds all of an answer but what it predicts last. Behind each stands `END`, and it alone has a weight: so
    the place that has one is the answer's own last token.
    """
    ids, parts, sizes = np.asarray(groups.ids), list[Array](), list[int]()
    for index in range(len(groups)):
        spans = groups.completions(index)
        answers = [ids[begin : _last(ids, begin, end, pad)] for begin, end in spans]
        parts += [ids[int(groups.starts[index]) : spans[0][0]], *answers]
        sizes += [0, *(1 for _ in answers)]
    return _laid(groups, parts, np.array(sizes))


def _last(ids: Array | Sequence[int], begin: int, end: int, pad: int | None) -> int:
    """Where an answer ends without what fills rows up; something of it is left."""
    while end - 1 > begin and ids[end - 1] == pad:
        end -= 1
    return end


def _laid(groups: Groups, parts: Sequence[Array], ends: Array) -> Groups:
    """Prompts and answers end to end; `ends` is 1 for each answer and 0 for each prompt."""
    lengths = np.array([len(part) for part in parts])
    edges = np.concatenate([[0], np.cumsum(lengths + ends)])
    ids = np.full(edges[-1], END, np.int32)
    weights = np.zeros(edges[-1], np.float32)
    for begin, part in zip(edges, parts, strict=False):
        ids[begin : begin + len(part)] = part
    weights[edges[1:][ends == 1] - 1] = 1.0
    starts = np.concatenate([edges[:-1][ends == 0], edges[-1:]]).astype(np.int64)
    forks = edges[:-1][ends == 1].astype(np.int64)
    per = {**groups.per, "length": lengths[ends == 1].astype(np.float32)}
    digest = hashlib.sha256(b"".join(x.tobytes() for x in (ids, weights, starts, forks, *per.values()))).hexdigest()
    counts = groups.counts | {"tokens": int(lengths.sum()), "supervised tokens": len(forks)}
    return replace(groups, ids=ids, weights=weights, starts=starts, forks=forks, per=per, digest=digest, counts=counts)
