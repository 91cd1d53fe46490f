"""A reward model: the one output of a classifier of transformers, at the last token of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmkit.build.held import autocast
from llmkit.build.laid import laid
from llmkit.build.opening import load
from llmkit.build.precision import reading
from llmkit.build.training import check, headed
from llmkit.core.errors import ModelError
from llmkit.core.types import Batch, Packed
from llmkit.data.render import Renderer
from llmkit.data.rows import Row, Unusable
from llmkit.models.load import How
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.rl.bench import Bench
from llmkit.rl.sample import Fault, Sample, Score


class RewardModel:
    """One that is loaded and at rest."""

    def __init__(self, ref: ModelRef, bench: Bench) -> None:
        """
        Raises:
            ModelError: it cannot be loaded, or is none that scores whole answers.
        """
        self.kinds, self.device, resolved = reading(bench.precision, bench.device), bench.device, resolve(ref)
        grants = bench.grants
        held = (self.kinds.params, self.kinds.half, resolved.quant, grants.code, grants.nonfinite)
        self.loaded = load(resolved, ref, How(bench.device, *held))
        head = self.loaded.head
        if head is None or head.task != "sequence" or len(head.labels) != 1:
            is_one = "a language model" if head is None else f"a {head.task} classifier of {len(head.labels)}"
            raise ModelError(f"{ref.name} is {is_one}", fix="give what kind: reward made", key="path")
        self.scored = headed(self.loaded, self.loaded.model).eval()
        check(self.scored)
        self.renderer = Renderer(self.loaded.tokenizer)
        self.longest = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """A score for each, in order."""
        rows = [self._read(sample) for sample in samples]
        fit = [at for at, row in enumerate(rows) if not isinstance(row, Fault)]
        made: list[Score] = [row if isinstance(row, Fault) else 0.0 for row in rows]
        texts = [row for row in rows if not isinstance(row, Fault)]
        with autocast(self.device, self.kinds.mixed):
            for group, batch in laid(texts, self.loaded.support.packed, self.device):
                found = self.scored(replace(batch, weights=_last(batch)))[:, 0].float().tolist()
                for at, value in zip(group, found, strict=True):
                    made[fit[at]] = value
        return made

    def close(self) -> None:
        """It goes with the last who holds it."""

    def _read(self, sample: Sample) -> list[int] | Fault:
        """The tokens up to where the answer ends, as a reward model is trained on them."""
        said = sample.said
        row = Row(0, "", prompt=sample.prompt, completion=str(said)) if isinstance(sample.prompt, str) else None
        try:
            row = row or Row(0, "", messages=(*sample.prompt, *said), tools=tuple(sample.row.get("tools") or ()))
            ids, weights = self.renderer.encode([self.renderer.render(row)])[0]
        except Unusable as reason:
            return Fault(f"cannot be rendered: {reason}", certain=True)
        end = max((at for at, weight in enumerate(weights) if weight), default=len(ids) - 1) + 1
        if self.longest is not None and end > self.longest:
            return Fault(f"has {end} tokens with its prompt, and the reward model reads {self.longest}", certain=True)
        return ids[:end]


def _last(batch: Batch) -> torch.Tensor:
    """Weights of 1 at the last token of each sequence, 0 elsewhere; sequences lie in the order of the batch."""
    weights = torch.zeros_like(batch.weights)
    if isinstance(batch.attend, Packed):
        for segment in batch.attend.segments:
            weights[segment.row, segment.end - 1] = 1.0
    for row, length in enumerate(batch.lengths):
        weights[row, length - 1] = 1.0
    return weights
