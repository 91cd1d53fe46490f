"""What rows ask, where their answers are made anew: first prompts alone, then the answers behind them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from llmkit.data.encode import Rendered
from llmkit.data.node import Data, Readable
from llmkit.data.prepare import named
from llmkit.data.prepared import Prepared
from llmkit.data.render import Renderer
from llmkit.data.rows import BadRow, Raw, Row, Unusable
from llmkit.data.usable import Tally, usable

T = TypeVar("T", bound=Prepared)


def prompts(
    sources: Sequence[Readable],
    data: Data,
    tokenizer: Any,
    key: str = "data.train",
    aside: Callable[[BadRow], None] | None = None,
    least: int = 1,
) -> Prepared:
    """What the rows ask, up to where their last answers begin, as examples of which nothing is trained; those that
    leave no room for an answer in `data.max_length` are left out.

    Raises:
        DataError: a row cannot be read, too many are unusable, or too few are left.
    """
    renderer, tally = Renderer(tokenizer), Tally(data, Counter[str](), aside)
    asked: list[tuple[Raw, Row, Rendered]] = []
    for raw, row in usable(sources, tally):
        try:
            if not row.question:
                raise Unusable("nothing is asked")
            asked.append((raw, row, renderer.prompt(row.question, row.tools)))
        except Unusable as reason:
            tally.unusable(raw, str(reason))
    made, _ = asking_alone(asked, renderer, tally, data, sources, key, least)
    return made


def asking_alone(
    asked: Sequence[tuple[Raw, Row, Rendered]],
    renderer: Renderer,
    tally: Tally,
    data: Data,
    sources: Sequence[Readable],
    key: str,
    least: int,
) -> tuple[Prepared, list[int]]:
    """Prompts as examples of which nothing is trained, and which of `asked` they are: those that leave room.

    Raises:
        DataError: too many are unusable, or too few are left.
    """
    encoded = [ids for ids, _ in renderer.encode([rendered for *_, rendered in asked])]
    kept = [at for at, ids in enumerate(encoded) if 0 < len(ids) < data.max_length]
    tally.counts["too long: no room for an answer"] += len(encoded) - len(kept)
    tally.check(len(kept), least, key)
    files = named({path: digest for source in sources for path, digest in source.files().items()})
    rows, places = [asked[at][1] for at in kept], [(asked[at][0].file, asked[at][0].line) for at in kept]
    made = Prepared(*flat([(encoded[at], []) for at in kept]), rows, dict(tally.counts), files=files, places=places)
    return counted(made), kept


def answered(asked: Prepared, answers: Sequence[Sequence[int]]) -> Prepared:
    """Prompts with the tokens of an answer behind each, which are trained; those without one are left out."""
    kept = [at for at, answer in enumerate(answers) if answer]
    texts = [(asked.example(at)[0].tolist(), list(answers[at])) for at in kept]
    ids, weights, starts = flat(texts)
    rows, places = [asked.rows[at] for at in kept], [asked.places[at] for at in kept]
    return counted(replace(asked, ids=ids, weights=weights, starts=starts, rows=rows, places=places))


def flat(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Any, Any, Any]:
    """Token ids, weights and starts of prompts and their answers, end to end."""
    ids = np.concatenate([np.asarray([*prompt, *answer], np.int32) for prompt, answer in texts])
    learned = [np.repeat(np.array([0, 1], np.float32), [len(prompt), len(answer)]) for prompt, answer in texts]
    lengths = [len(prompt) + len(answer) for prompt, answer in texts]
    return ids, np.concatenate(learned), np.cumsum([0, *lengths]).astype(np.int64)


def counted(made: T) -> T:
    """The same with its account and its digest."""
    ids, weights = np.asarray(made.ids), np.asarray(made.weights)
    digest = hashlib.sha256(ids.tobytes() + weights.tobytes() + made.starts.tobytes()).hexdigest()
    counts = {"examples": len(made), "tokens": len(ids), "supervised tokens": int((weights > 0).sum())}
    return replace(made, counts=made.counts | counts, digest=digest)
