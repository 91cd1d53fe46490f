"""What contradicts what in the `data` of a mix or of streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmkit.core.config import Conflict
from llmkit.data.mix import Mix, schedule_problems, weight_at

if TYPE_CHECKING:
    from llmkit.data.node import Data

BUFFER = 4096
"""Rows of a stream that are shuffled together, where the recipe does not say."""


def mix_problems(data: Data) -> Iterator[Conflict]:
    """Weights that are none, are missing, or are of rows that nothing mixes."""
    weights = [source.weight for source in data.train]
    given = [index for index, weight in enumerate(weights) if weight is not None]
    wrong = [problem for i, weight in enumerate(weights) for problem in schedule_problems(weight, f"train.{i}.weight")]
    yield from wrong
    for index in (i for i in range(len(weights)) if given and i not in given):
        what = "is missing, and another source has one"
        yield Conflict(f"train.{index}.weight", what, "give each source one, or none", f"train.{given[0]}.weight")
    for key, sources in (("valid", data.valid), ("decontaminate", data.decontaminate)):
        for index, source in enumerate(sources):
            if source.weight is not None:
                yield Conflict(f"{key}.{index}.weight", "is of no use: these rows are not mixed", "leave it out")
    if data.mix != Mix() and not data.mixed:
        yield Conflict("mix", "nothing is mixed", "give each source of train a weight, or leave it out", "train")
    if wrong or not given or len(given) < len(weights):
        return
    points = {at for weight in weights if isinstance(weight, tuple) for at, _ in weight}
    for part in sorted({0.0, 1.0, *points}):
        if not any(weight_at(weight, part) for weight in weights if weight is not None):
            yield Conflict("train", f"no source has a share at {part:g} of the run", "give one a weight there")


def stream_problems(data: Data) -> Iterator[Conflict]:
    """What a stream cannot do, and what is of a stream alone."""
    if not data.streaming:
        if data.buffer != BUFFER:
            yield Conflict("buffer", "is of a stream", "set streaming: true, or leave it out", "streaming")
        return
    if len(data.train) > 1 and any(source.weight is None for source in data.train):
        yield Conflict("streaming", "the sizes of streams are not known", "give each source a weight", "train")
    if data.mix.stop != Mix().stop:
        yield Conflict("mix.stop", "where an epoch ends is not known of streams", "leave it out", "streaming")
    if data.lint.level == "error":
        what = "a stream is linted by `llmkit check` alone"
        yield Conflict("lint.level", what, "set lint: warn, or leave streaming out", "streaming")
    wrong = {
        "dedup": data.dedup.kind != "none",
        "decontaminate": bool(data.decontaminate),
        "held_out": bool(data.held_out.share),
    }
    for key in (key for key, said in wrong.items() if said):
        yield Conflict(key, "would read the whole stream first", f"leave {key} out, or streaming", "streaming")
