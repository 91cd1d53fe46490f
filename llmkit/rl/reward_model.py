"""Rewards of a model that scores answers."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.build import reward_model
from llmkit.data.rows import Row, Unusable
from llmkit.models.node import ModelRef
from llmkit.rl.bench import Bench
from llmkit.rl.foreseen import check_head
from llmkit.rl.sample import Fault, Sample, Score


class RewardModel:
    """One that is loaded and at rest."""

    def __init__(self, ref: ModelRef, bench: Bench) -> None:
        """
        Raises:
            ModelError: it cannot be loaded, or is none that scores whole answers.
        """
        self.model = reward_model.RewardModel(ref, bench.device, bench.precision, bench.grants, "path")
        check_head(self.model.loaded.head, ref.name, "path")

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """A score for each, in order."""
        rows = [self._read(sample) for sample in samples]
        found = iter(self.model.of_tokens([row for row in rows if not isinstance(row, Fault)]))
        return [row if isinstance(row, Fault) else next(found) for row in rows]

    def close(self) -> None:
        """It goes with the last who holds it."""

    def _read(self, sample: Sample) -> list[int] | Fault:
        """The tokens up to where the answer is scored, as in training."""
        said, prompt = sample.said, sample.prompt
        if isinstance(said, str):
            row = Row(0, "", prompt=str(prompt), completion=said)
        else:
            tools = tuple(sample.row.get("tools") or ())
            prompt = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
            row = Row(0, "", messages=(*prompt, *said), learn_from=len(prompt), tools=tools)
        try:
            (ids,) = self.model.tokens([row])
        except Unusable as reason:
            return Fault(f"cannot be rendered: {reason}", certain=True)
        longest = self.model.longest
        if longest is not None and len(ids) > longest:
            return Fault(f"has {len(ids)} tokens with its prompt, and the reward model reads {longest}", certain=True)
        return ids
