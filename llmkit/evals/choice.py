"""Multiple choice: which of several answers is the likeliest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkit.core.errors import DataError
from llmkit.core.records import Prediction
from llmkit.core.types import Report
from llmkit.data.order import spread
from llmkit.data.prepare import Prepared
from llmkit.data.render import Rendered, Renderer
from llmkit.data.rows import Raw, Row, Unusable, bounded, mapped
from llmkit.data.shapes import shaped
from llmkit.evals.run import Subject, before_answer, losses, record
from llmkit.evals.tasks import MultipleChoice
from llmkit.stats.bootstrap import ratio


@dataclass(frozen=True)
class _Item:
    """One question with its choices, each as a text after it."""

    row: Row
    choices: tuple[str, ...]
    rendered: tuple[Rendered, ...]
    label: int


def multiple_choice(task: MultipleChoice, subject: Subject) -> tuple[list[Prediction], list[Report]]:
    """Accuracy of the likeliest choice, by what it says and not by how it ends.

    Raises:
        DataError: a row cannot be asked, or there is none.
    """
    renderer = Renderer(subject.tokenizer)
    found = list(_items(task, renderer))
    items = [found[i] for i in spread(len(found), task.rows)]
    if not items:
        raise DataError("the evaluation set is empty", fix="give rows", key=f"tasks.{task.name}")
    encoded = renderer.encode([choice for item in items for choice in item.rendered])
    prepared = _as_prepared(encoded)
    nll, tokens = losses(subject, prepared, range(len(encoded)), max(64, int(np.diff(prepared.starts).max())))
    table: list[Prediction] = []
    at = 0
    for item in items:
        mine = range(at, at := at + len(item.choices))
        sizes = {"sum": [1.0] * len(mine), "token": [tokens[i] for i in mine]}
        sizes["byte"] = [float(len(choice.encode())) for choice in item.choices]
        marks = [-nll[i] / max(1.0, size) for i, size in zip(mine, sizes[task.length], strict=True)]
        best = int(np.argmax(marks))
        score = {"accuracy": float(best == item.label), **{f"choice_{k}": mark for k, mark in enumerate(marks)}}
        asked = before_answer(*encoded[mine[0]])
        table.append(record(subject, task.name, item.row, asked, score, item.choices[best], item.choices[item.label]))
    right = [row.scores["accuracy"] for row in table]
    return table, [ratio(f"{task.name}.accuracy", right, None, [row.cluster_id for row in table], seed=subject.seed)]


def _items(task: MultipleChoice, renderer: Renderer) -> Iterator[_Item]:
    found = ((source, raw) for source in task.data for raw in source.rows())
    for number, (source, given) in enumerate(found):
        raw = bounded(given) if isinstance(given, Raw) else given
        if not isinstance(raw, Raw):
            raise raw
        values = mapped(raw, source.columns)
        try:
            yield _item(values, number, renderer)
        except Unusable as reason:
            raise DataError(
                f"needs `prompt`, `choices` (a list of texts) and `label` (an index): {reason}",
                fix="mend the row, or map its columns",
                file=raw.file,
                line=raw.line,
            ) from reason


def _item(values: Any, number: int, renderer: Renderer) -> _Item:
    choices, label = values.get("choices"), values.get("label")
    if not isinstance(choices, list) or len(choices) < 2:
        raise Unusable("choices is not a list of two or more")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise Unusable("a choice is blank or not text")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise Unusable("label is no index of choices")
    prompt = values.get("prompt")
    rows = [
        shaped(
            {
                "prompt": prompt,
                "completion": [{"role": "assistant", "content": choice}] if isinstance(prompt, list) else choice,
                "tools": values.get("tools"),
                "cluster": values.get("cluster", number),
            },
            number,
        )
        for choice in choices
    ]
    return _Item(rows[0], tuple(choices), tuple(renderer.unclosed(renderer.render(row)) for row in rows), label)


def _as_prepared(encoded: Sequence[tuple[list[int], list[float]]]) -> Prepared:
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in encoded])]).astype(np.int64)
    ids = np.concatenate([np.array(ids, dtype=np.int32) for ids, _ in encoded])
    weights = np.concatenate([np.array(w, dtype=np.float32) for _, w in encoded])
    return Prepared(ids, weights, starts, ())
