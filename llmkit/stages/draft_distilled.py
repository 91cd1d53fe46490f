"""`drafter: {kind: distilled}`: a small model of the same tokenizer, which learns what the model says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from llmkit.core.config import Conflict, config, setting
from llmkit.core.shape import Cost, Shape
from llmkit.data.node import FirstFit
from llmkit.losses.distil_node import DistilLoss, ForwardKl
from llmkit.models.node import ModelRef
from llmkit.stages.drafters import Maker
from llmkit.train.answers import Answers, Own

if TYPE_CHECKING:
    from llmkit.build.training import Built
    from llmkit.data.prepare import Prepared
    from llmkit.evals.run import Subject
    from llmkit.parallel.steps import Loss
    from llmkit.stages.draft import Draft


@config
class Distilled(Maker):
    """A small model that is made of the model's own layers, or given, and trained to say what the model says; it
    drafts in `speculation: {kind: draft, model: FOLDER}`, and is a Hugging Face folder as any."""

    larger_is_better: ClassVar[Mapping[str, bool]] = {
        "valid.loss": False,
        "valid.tokens_per_step": True,
        "valid.kept_1": True,
    }
    kind: Literal["distilled"] = "distilled"
    answers: Answers = Own()
    layers: int | tuple[int, ...] = setting(default=4, least=1)
    """How many of the model's layers it is made of, from the first to the last, or which (from 0 on):
    in any order, each once."""
    width: int | None = setting(default=None, least=2)
    """Of its hidden states, where they are narrower than the model's: then its layers begin at random, and its
    embeddings as the model's in their main directions."""
    start: ModelRef | None = None
    """A small model that there is, of the same tokenizer, in the place of one that is made."""
    loss: DistilLoss = ForwardKl()
    """What is made small."""

    def odd(self, stage: Draft) -> Iterator[Conflict]:
        """What of the stage contradicts it."""
        if not isinstance(stage.data.packing, FirstFit):
            what = "a small model learns from packed rows"
            yield Conflict("data.packing", what, "drop data.packing", "drafter.kind")
        for key in ("layers", "width"):
            if self.start is not None and getattr(self, key) != {"layers": 4, "width": None}[key]:
                what = "is that of the model that it starts from"
                yield Conflict(f"drafter.{key}", what, f"drop drafter.{key}", "drafter.start")
        if self.layers == ():
            yield Conflict("drafter.layers", "names no layer", "give how many, or which")
        if not isinstance(self.layers, int) and len(set(self.layers)) < len(self.layers):
            yield Conflict("drafter.layers", "names a layer twice", "name each once")

    def fits(self, stage: Draft, fetch: bool = False) -> None:
        """The model has such layers, and is wider; what is to start from has its tokens."""
        from llmkit.stages.draft_fits import check_distilled

        check_distilled(self, stage.model, fetch)

    def cost(self, shape: Shape) -> Cost:
        """Its weights."""
        if self.start is not None:
            from llmkit.models.outline import stored
            from llmkit.models.resolve import resolve

            there = stored(resolve(self.start).folder)
            own, count = there.params, there.layers
        else:
            count = self.layers if isinstance(self.layers, int) else len(self.layers)
            share = 1.0 if self.width is None else self.width / max(1, shape.hidden)
            inside = (shape.params - shape.embedded) * count / max(1, shape.layers)
            own = int(inside * share**2 + shape.embedded * share)
        return Cost(own, more=own, head=True, layers=count)

    def objective(self, stage: Draft, train: Prepared) -> Loss:
        """The loss, which is its own node."""
        return self.loss

    def around(self, stage: Draft, built: Built, train: Prepared, folder: Path) -> Built:
        """The small model, beside the one that it learns from."""
        from llmkit.stages.draft_students import around

        return around(self, built, stage.seed)

    def leave(self, stage: Draft, built: Built, folder: Path, write: Callable[[Path], None]) -> None:
        """The small model, with its `draft.json`."""
        from llmkit.stages.draft_students import leave

        leave(self, built, folder, write)

    def measure(self, stage: Draft, subject: Subject, valid: Prepared, ids: Sequence[int]) -> dict[str, float]:
        """The figures (`valid.*`) of these rows: `kept_1` is how often a draft that is drawn is kept."""
        from llmkit.evals.drafting import held_out_drafts

        return held_out_drafts(subject, self.loss, valid, ids, stage.data.max_length)
