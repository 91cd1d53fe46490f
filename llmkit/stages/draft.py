"""`kind: draft`: what drafts for a model in speculative decoding, made for its weights and refused for others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.adapters.node import Adapter, NoAdapter
from llmkit.core.config import Conflict, config
from llmkit.core.errors import RecipeError
from llmkit.models.node import NoQuant
from llmkit.parallel.node import Parallel
from llmkit.stages.draft_distilled import Distilled
from llmkit.stages.draft_head import HeadDrafter
from llmkit.stages.draft_ngram import NgramCorpus
from llmkit.stages.training import Training

if TYPE_CHECKING:
    from pathlib import Path

    from llmkit.build.training import Built
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run
    from llmkit.core.shape import Cost, Shape
    from llmkit.data.node import Readable
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow
    from llmkit.evals.run import Subject
    from llmkit.parallel.steps import Loss

Drafter = NgramCorpus | Distilled | HeadDrafter
READ = {"kind", "model", "drafter", "data", "adapter", "precision", "parallel", "log", "push", "seed", "out"}
"""Keys that have a meaning where nothing is trained, or are looked at by themselves."""


@config
class Draft(Training):
    """What drafts for a model in speculative decoding (`speculation`): a corpus of texts to look things up in, a small
    model, or a head. `model/` has it with `draft.json`, which knows the weights that it was made for: for another model
    it is refused."""

    writes: ClassVar[bool] = False
    kind: Literal["draft"] = "draft"
    adapter: Adapter = NoAdapter()
    """Nothing is attached to the model: it stays as it is."""
    drafter: Drafter
    """What is made."""

    @property
    def trained(self) -> bool:
        """Whether the loop makes it."""
        return self.drafter.trains

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if self.trained:
            yield from (odd for odd in super().problems() if odd.key != "quant.kind")
            if not isinstance(self.quant, NoQuant):
                yield Conflict("quant.kind", "what drafts learns from weights as they are", "drop quant", "kind")
        else:
            for name in (item.name for item in fields(self) if item.name not in READ):
                if getattr(self, name) != _default(self, name):
                    yield Conflict(name, f"drafter {self.drafter.kind} trains nothing", f"drop {name}", "drafter.kind")
        for key, plain in (("adapter", self.adapter == NoAdapter()), ("parallel", _alone(self.parallel))):
            if not plain:
                yield Conflict(key, "what drafts is made by one process, beside the model", f"drop {key}", "kind")
        if self.data.streaming:
            what = "rows are read whole before anything drafts"
            yield Conflict("data.streaming", what, "leave data.streaming out", "kind")
        yield from self.drafter.odd(self)

    def larger_better(self, metric: str) -> bool | None:
        """Whether more of a metric is better; None where it is not measured."""
        return self.drafter.larger_is_better.get(metric)

    def needs(self, device: str) -> None:
        """What is not trained asks nothing of a device; what is made must be one for this model."""
        if self.trained:
            super().needs(device)
            self.drafter.fits(self)

    def run(self, run: Run) -> Artifact:
        """Makes what drafts, and leaves it in `model/` with the manifest and the report."""
        if run.ranks.world > 1:
            raise RecipeError(f"{run.ranks.world} ranks, and what drafts is made by one", fix="run one process")
        return self.drafter.run(self, run)

    def examples(
        self,
        sources: Sequence[Readable],
        tokenizer: Any,
        key: str,
        aside: Callable[[BadRow], None] | None = None,
        least: int = 1,
    ) -> Prepared:
        """The rows of `data.train` or `data.valid` (`key`), or what they ask where the model answers itself.

        Raises:
            DataError: a row cannot be read, too many are unusable, or too few are left.
        """
        return self.drafter.examples(self.data, sources, tokenizer, key, aside, least)

    def cost(self, shape: Shape) -> Cost:
        """What is trained beside the model."""
        return self.drafter.cost(shape)

    def answered(self, prepared: Prepared, run: Run, key: str) -> Prepared:
        """The same with the model's own answers, where those are learned."""
        return self.drafter.answered(self, prepared, run, key)

    def objective(self, train: Prepared) -> Loss:
        """What is made small."""
        return self.drafter.objective(self, train)

    def around(self, built: Built, train: Prepared, run: Run) -> Built:
        """What drafts, beside the model that it drafts for."""
        return self.drafter.around(self, built, train, run.scratch)

    def leave(self, built: Built, folder: Path, write: Callable[[Path], None]) -> None:
        """What drafts, with its `draft.json`."""
        self.drafter.leave(self, built, folder, write)

    def measure(self, subject: Subject, valid: Prepared, ids: Sequence[int]) -> dict[str, float]:
        """The figures (`valid.*`) of these validation rows."""
        return self.drafter.measure(self, subject, valid, ids)


def _alone(parallel: Parallel) -> bool:
    """Whether one process computes."""
    return (
        parallel.strategy.kind in ("auto", "single") and replace(parallel, strategy=Parallel().strategy) == Parallel()
    )


def _default(stage: Draft, name: str) -> Any:
    item = next(item for item in fields(stage) if item.name == name)
    return item.default if item.default_factory is MISSING else item.default_factory()
