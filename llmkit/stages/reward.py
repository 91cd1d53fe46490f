"""`kind: reward`: a model that scores answers, learnt from pairs, or judges steps, learnt from their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.core.config import Conflict, config
from llmkit.data.node import Readable
from llmkit.losses.node import ClassEntropy, Seen
from llmkit.losses.reward_node import BradleyTerry, RewardLoss
from llmkit.models.node import Head
from llmkit.models.rewarded import OUTCOME
from llmkit.stages.branching import branching
from llmkit.stages.heads import useless
from llmkit.stages.training import Training

if TYPE_CHECKING:
    from llmkit.build.training import Built
    from llmkit.core.records import Prediction
    from llmkit.core.run import Run
    from llmkit.core.types import Report
    from llmkit.data.groups import Groups
    from llmkit.data.labelled import Labelled
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow
    from llmkit.evals.run import Subject
    from llmkit.parallel.steps import Loss

BY_TASK: Mapping[str, Mapping[str, bool]] = {
    "outcome": {
        "valid.loss": False,
        "valid.accuracy": True,
        "valid.length_controlled_accuracy": True,
        "valid.ece": False,
        "valid.brier": False,
    },
    "process": {
        "valid.loss": False,
        "valid.accuracy": True,
        "valid.first_error": True,
        "valid.first_error_f1": True,
        "valid.ece": False,
        "valid.brier": False,
    },
}
"""What evaluations measure, and whether more of it is better."""


@config
class Reward(Training):
    """A reward model in a head that plain transformers and peft load.

    Rows hold a `prompt` with `chosen` and `rejected` answers, maybe a `margin`; or, for steps, a `prompt` with
    `completions` and `labels`, one a step."""

    larger_is_better: ClassVar[Mapping[str, bool]] = {**BY_TASK["outcome"], **BY_TASK["process"]}
    kind: Literal["reward"] = "reward"
    task: Literal["outcome", "process"] = "outcome"
    """One score for a whole answer, read at its last token; or of each step whether it is right, read at its end."""
    loss: RewardLoss | None = None
    """Left out, `bradley_terry` of answers and `cross_entropy` of steps."""
    share_prompts: bool = True
    """A prompt is computed once for both of its answers, where the model's attention can: with equal gradients, in
    fewer tokens."""
    separator: str = "\n"
    """What stands behind each step; at its last token the step is judged."""
    threshold: float = 0.5
    """Labels of steps that are numbers: the least that is right."""

    @property
    def by_steps(self) -> bool:
        """Whether steps are judged, and no whole answers."""
        return self.task == "process"

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        yield from super().problems()
        yield from useless(self, "rows of steps" if self.by_steps else "pairs", "a reward model")
        if self.loss is not None and isinstance(self.loss, BradleyTerry) == self.by_steps:
            what = "is over pairs of answers" if self.by_steps else "is over classes, and an answer has none"
            fix = "use cross_entropy or focal" if self.by_steps else "use bradley_terry"
            yield Conflict("loss.kind", what, fix, "task")
        if self.by_steps and self.data.lint.level == "error":
            yield Conflict("data.lint.level", "rows of steps are not linted yet", "drop data.lint", "task")
        for name in () if self.by_steps else ("context", "pipeline"):
            if getattr(self.parallel, name) > 1:
                what = "a pair's two scores are made on one rank"
                yield Conflict(f"parallel.{name}", what, f"set parallel.{name}=1", "task")
        for key in ("share_prompts",) if self.by_steps else ("separator", "threshold"):
            if getattr(self, key) != getattr(Reward, key):
                whose, other = ("pairs", "outcome") if self.by_steps else ("steps", "process")
                yield Conflict(key, f"is of {whose}", f"drop it, or set task: {other}", "task")

    @property
    def counted(self) -> Literal["rows", "pairs"]:
        """Pairs of answers; rows of steps."""
        return "rows" if self.by_steps else "pairs"

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row: two answers of `data.max_length` with a prompt each fill one."""
        return self.data.max_length * (1 if self.by_steps else 2)

    def around(self, built: Built, train: Prepared, run: Run) -> Built:
        """The model, which is given branches of shared prompts where it can."""
        return built if self.by_steps else branching(built, self.share_prompts, self.data.max_length)

    def larger_better(self, metric: str) -> bool | None:
        """Whether more of a metric is better; None where it is not measured."""
        return BY_TASK[self.task].get(metric)

    def examples(
        self,
        sources: Sequence[Readable],
        tokenizer: Any,
        key: str,
        aside: Callable[[BadRow], None] | None = None,
        least: int = 1,
    ) -> Prepared:
        """The examples of `data.train` or `data.valid` (`key`), at least `least` of them; bad rows go `aside`.

        Raises:
            DataError: a row cannot be read, too many are unusable, or too few are left.
        """
        from llmkit.data.judged import judged
        from llmkit.data.stepwise import Steps, stepwise

        if self.by_steps:
            how = Steps(self.separator, self.threshold)
            return stepwise(sources, self.data, tokenizer, how, key, aside, least)
        counted = "rows" if self.batch.pairs is None else "pairs"
        return judged(sources, self.data, tokenizer, key, aside, least, counted)

    def head(self, train: Prepared) -> Head:
        """One number for answers, the two classes of steps."""
        if self.by_steps:
            return Head("token", self._steps(train).classes, self.seed)
        return Head("sequence", OUTCOME, self.seed)

    def objective(self, train: Prepared) -> Loss:
        """The loss over scores of pairs, or over the classes of steps."""
        said = self.loss
        if not self.by_steps:
            return said if isinstance(said, BradleyTerry) else BradleyTerry()
        over = ClassEntropy() if said is None or isinstance(said, BradleyTerry) else said
        return over.over(Seen(self._steps(train).counts_by_class.tolist()))

    def measure(self, subject: Subject, valid: Prepared, ids: Sequence[int]) -> dict[str, float]:
        """The figures (`valid.*`) of these validation rows."""
        from llmkit.evals import pairs, steps

        if self.by_steps:
            return steps.measured(subject, self._steps(valid), ids, self.row_tokens)
        return pairs.measured(subject, self._pairs(valid), ids, self.row_tokens)

    def final(self, subject: Subject, valid: Prepared) -> tuple[list[Prediction], list[Report]]:
        """A table of what the result says of the validation rows, and its figures with intervals."""
        from llmkit.data.order import spread
        from llmkit.evals import pairs, steps

        ids, size = spread(len(valid), self.evaluate.rows), self.row_tokens
        if self.by_steps:
            return steps.judged(subject, self._steps(valid), ids, size, "valid")
        return pairs.judged(subject, self._pairs(valid), ids, size, "valid")

    def _pairs(self, prepared: Prepared) -> Groups:
        from llmkit.data.groups import Groups

        if not isinstance(prepared, Groups):
            raise TypeError("these rows have no answers")
        return prepared

    def _steps(self, prepared: Prepared) -> Labelled:
        from llmkit.data.labelled import Labelled

        if not isinstance(prepared, Labelled):
            raise TypeError("these rows have no steps")
        return prepared
