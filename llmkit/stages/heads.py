"""What stages that train a head have no use for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmkit.adapters.limits import virtual_tokens
from llmkit.core.config import Conflict
from llmkit.data.cleaning import NoDedup
from llmkit.train.node import Evaluating

if TYPE_CHECKING:
    from llmkit.stages.training import Training


def useless(node: Training, rows: str, a_head: str) -> Iterator[Conflict]:
    """Keys that a head over whole rows, or over places in them, has no use for; `rows` and `a_head` are what its rows
    and what is trained are called."""
    data = node.data
    if virtual_tokens(node.adapter):
        what = f"{node.adapter.kind} puts tokens of its own before a row, and a head reads rows as they are"
        yield Conflict("adapter.kind", what, "use adapter: {kind: lora}")
    if data.dedup != NoDedup() or data.decontaminate:
        key = "data.decontaminate" if data.decontaminate else "data.dedup"
        yield Conflict(key, f"{rows} are not compared with others yet", f"drop {key}", "kind")
    if data.streaming or data.mixed:
        key = "data.streaming" if data.streaming else "data.mix"
        yield Conflict(key, f"{rows} are neither streamed nor mixed yet", f"drop {key} and weights", "kind")
    if data.overflow == "split":
        yield Conflict("data.overflow", "a label is of the whole row", "use drop or truncate", "kind")
    for key in ("samples", "max_tokens"):
        if getattr(node.evaluate, key) != getattr(Evaluating(), key):
            yield Conflict(f"evaluate.{key}", f"{a_head} writes no answers", f"drop evaluate.{key}", "kind")
    if data.train_on != "assistant":
        yield Conflict("data.train_on", "labels are trained, not tokens", "drop data.train_on", "kind")
