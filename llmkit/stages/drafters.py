"""What a member of the `drafter` union says of itself to the stage; what it does not say is as in any training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.core.config import Conflict, config
from llmkit.core.files import published
from llmkit.core.shape import Cost, Shape
from llmkit.losses.node import CrossEntropy
from llmkit.train.answers import Answers, Given, Own

if TYPE_CHECKING:
    from llmkit.build.training import Built
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run
    from llmkit.data.node import Data, Readable
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow
    from llmkit.evals.run import Subject
    from llmkit.parallel.steps import Loss
    from llmkit.stages.draft import Draft


@config
class Maker:
    """Makes what drafts for a model; a member of the union gives its own answer where it has one."""

    trains: ClassVar[bool] = True
    """Whether the loop makes it: else no key of a training has a meaning."""
    larger_is_better: ClassVar[Mapping[str, bool]] = {}
    """What evaluations measure, for `checkpoint.best`; of what is not trained nothing."""
    kind: str = ""
    answers: Answers = Own()
    """Whose answers it learns from: `own` asks the model what the rows ask, and takes what it says; `given` takes the
    rows' own."""

    def odd(self, stage: Draft) -> Iterator[Conflict]:
        """What of the stage contradicts it."""
        return iter(())

    def fits(self, stage: Draft, fetch: bool = False) -> None:
        """Sees to it that it can be made for the stage's model, where that is here or may be fetched."""

    def run(self, stage: Draft, run: Run) -> Artifact:
        """Makes it."""
        from llmkit.stages.build_training import train

        return train(stage, run)

    def examples(
        self,
        data: Data,
        sources: Sequence[Readable],
        tokenizer: Any,
        key: str,
        aside: Callable[[BadRow], None] | None,
        least: int,
    ) -> Prepared:
        """The rows of `data.train` or `data.valid` (`key`), or what they ask where the model answers itself."""
        return self.answers.examples(data, sources, tokenizer, key, aside, least)

    def answered(self, stage: Draft, prepared: Prepared, run: Run, key: str) -> Prepared:
        """The same with the model's own answers."""
        if isinstance(self.answers, Given):
            return prepared
        if key == "data.train":
            self.fits(stage, fetch=True)  # before the work
        from llmkit.stages.answers import own_answers

        longest = stage.data.max_length
        return own_answers(prepared, self.answers, stage.model, stage.types_name, longest, run, key)

    def cost(self, shape: Shape) -> Cost:
        """What memory it takes beside a model of this shape."""
        return Cost(0)

    def objective(self, stage: Draft, train: Prepared) -> Loss:
        """What is made small."""
        return CrossEntropy()

    def around(self, stage: Draft, built: Built, train: Prepared, folder: Path) -> Built:
        """What is trained in the place of the model."""
        return built

    def leave(self, stage: Draft, built: Built, folder: Path, write: Callable[[Path], None]) -> None:
        """Leaves it as `folder`, with its `draft.json`; `write` writes the model into a folder."""
        with published(folder) as aside:
            write(aside)

    def measure(self, stage: Draft, subject: Subject, valid: Prepared, ids: Sequence[int]) -> dict[str, float]:
        """The figures (`valid.*`) of these rows."""
        from llmkit.evals.run import held_out

        return held_out(subject, valid, ids, stage.data.max_length)
