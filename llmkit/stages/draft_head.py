"""`drafter: {kind: head}`: a head of one layer that reads the model's own hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from llmkit.core.config import Conflict, config, setting
from llmkit.core.shape import Cost, Shape
from llmkit.data.node import FirstFit
from llmkit.losses.draft_node import DraftLoss, SoftEntropy
from llmkit.stages.drafters import Maker
from llmkit.train.answers import Answers, Own

if TYPE_CHECKING:
    from llmkit.build.training import Built
    from llmkit.data.prepare import Prepared
    from llmkit.evals.run import Subject
    from llmkit.parallel.steps import Loss
    from llmkit.stages.draft import Draft


@config
class HeadDrafter(Maker):
    """One decoder layer over hidden states of the model (EAGLE-3, arXiv:2503.01840), which drafts in
    `speculation: {kind: head, path: FOLDER}`. The model stays as it is, and is run once over each text."""

    larger_is_better: ClassVar[Mapping[str, bool]] = {"valid.loss": False, "valid.tokens_per_step": True}
    kind: Literal["head"] = "head"
    answers: Answers = Own()
    """Whose answers it learns: `own` asks the model what the rows ask, `given` takes those of the rows."""
    vocabulary: int = setting(default=8192, least=2)
    """Words that it drafts: those that are most often in the answers. Fewer are faster; others are never drafted."""
    taps: tuple[int, ...] = ()
    """Which hidden states it reads: the output of the i-th layer, from 1 on; of the last one after the model's norm.
    In any order, each once; left out: the second layer's, the middle one's and the last one's."""
    depth: int = setting(default=4, least=1, most=16)
    """Drafts in turn that it learns, each after its own outputs (training-time test)."""
    loss: DraftLoss = SoftEntropy()
    """What is made small."""
    start: str | None = None
    """A head that an earlier run left, from which this one goes on: after its model was trained further, a tenth of the
    steps is enough."""

    def odd(self, stage: Draft) -> Iterator[Conflict]:
        """What of the stage contradicts it."""
        if not isinstance(stage.data.packing, FirstFit):
            yield Conflict("data.packing", "a head learns from packed rows", "drop data.packing", "drafter.kind")
        for key in ("vocabulary", "taps"):
            if self.start is not None and getattr(self, key) != getattr(HeadDrafter(), key):
                yield Conflict(f"drafter.{key}", "is that of the head that it starts from", "drop it", "drafter.start")
        if len(set(self.taps)) < len(self.taps):
            yield Conflict("drafter.taps", "names a layer twice", "name each once")

    def fits(self, stage: Draft, fetch: bool = False) -> None:
        """The model has such layers; what is to start from can read them."""
        from llmkit.stages.draft_fits import check_head

        check_head(self, stage.model, fetch)

    def cost(self, shape: Shape) -> Cost:
        """Its layer and output layer, with the model's own rows of its words. Of a text its layer is kept once for each
        draft in turn, with the model's hidden states and its laws over these words."""
        wide, words = shape.hidden, min(self.vocabulary, shape.vocab)
        layer = wide * (wide * max(3, len(self.taps)) + 5 * wide + 4 * shape.keys + 3 * shape.intermediate)
        beside = words + (max(3, len(self.taps)) + 1) * wide
        return Cost(layer + words * wide, more=layer + 2 * words * wide, layers=self.depth, beside=beside)

    def objective(self, stage: Draft, train: Prepared) -> Loss:
        """The loss, which is its own node."""
        return self.loss

    def around(self, stage: Draft, built: Built, train: Prepared, folder: Path) -> Built:
        """The head, beside the model that it reads."""
        from llmkit.stages.draft_heads import around

        return around(self, built, train, folder, stage)

    def leave(self, stage: Draft, built: Built, folder: Path, write: Callable[[Path], None]) -> None:
        """The head, with its `draft.json`."""
        from llmkit.stages.draft_heads import leave

        leave(built, folder)

    def measure(self, stage: Draft, subject: Subject, valid: Prepared, ids: Sequence[int]) -> dict[str, float]:
        """The figures (`valid.*`) of these rows."""
        from llmkit.evals.drafting import held_out_drafts

        return held_out_drafts(subject, self.loss, valid, ids, stage.data.max_length)
