"""`kind: distill`: a teacher teaches a smaller student of the same tokenizer, by its laws, its answers, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.core.config import Conflict, config, setting
from llmkit.core.errors import RecipeError
from llmkit.inference.sampling import Sampling
from llmkit.losses.distil_node import Distillation, ForwardKl, StudentLoss
from llmkit.losses.node import CrossEntropy
from llmkit.models.node import ModelRef, Quant
from llmkit.plan.beside import Beside
from llmkit.stages.training import Training
from llmkit.train.answers import Given, OfTeacher, StudentAnswers

if TYPE_CHECKING:
    from llmkit.build.training import Built
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run
    from llmkit.core.shape import Cost, Shape
    from llmkit.data.feed import Feed
    from llmkit.data.node import Readable
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow
    from llmkit.evals.run import Subject
    from llmkit.parallel.steps import Loss, Steps
    from llmkit.stages.job import Job


@config
class Cached:
    """What the teacher says is asked for once, before training, and kept beside the run: it is in memory no more."""

    top_k: int = setting(default=64, least=1)
    """Likeliest words of each place that are kept with their log-probabilities. All others count as one word, for the
    student too: the divergence of these laws is at most that of whole ones, and equal to it at all words."""


@config
class Distill(Training):
    """A student learns what a larger model of the same tokenizer says (knowledge distillation). It is a model, or an
    adapter, as `kind: sft` leaves it."""

    larger_is_better: ClassVar[Mapping[str, bool]] = {
        "valid.loss": False,
        "valid.nll": False,
        "valid.divergence": False,
    }
    kind: Literal["distill"] = "distill"
    teacher: ModelRef
    """Who teaches; it stays as it is, and may be an adapter on its base."""
    teacher_quant: Quant | None = None
    """How the teacher is held; left out, as the student's `precision` says, an adapter's base as in its training."""
    answers: StudentAnswers = Given()
    """Whose answers are learned: those of the rows, or the teacher's own to what the rows ask."""
    loss: StudentLoss = ForwardKl()
    """How far the student's law is from the teacher's, at each place."""
    temperature: float = setting(default=1.0, above=0.0)
    """Both laws are taken at it, and the loss is multiplied by its square, which keeps the gradient's size."""
    cross_entropy: float = setting(default=0.0, least=0.0, most=1.0)
    """Its share of the loss, to the words that are there; at 1 the teacher's laws are not asked for: its answers alone
    teach."""
    cached: Cached | None = None
    """The teacher's laws, made once; left out, the teacher is run beside the student."""
    on_policy: float = setting(default=0.0, least=0.0, most=1.0)
    """The share of steps whose answers the student samples itself, from what the rows ask (GKD, arXiv:2306.13649)."""
    sampling: Sampling = setting(default_factory=lambda: Sampling(temperature=1.0, max_tokens=256))
    """How it samples them; each is seeded by the run's seed, its step and its place there."""

    @property
    def asked(self) -> bool:
        """Whether the teacher's laws are learned."""
        return self.cross_entropy < 1

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        yield from super().problems()
        if self.cached is not None and self.on_policy:
            what = "what the student will sample is not known before"
            yield Conflict("on_policy", what, "drop one of the two", "cached")
        for key in ("cached", "on_policy"):
            if getattr(self, key) and not self.asked:
                what = "the teacher's laws are not learned"
                yield Conflict(key, what, f"drop {key}, or lower cross_entropy", "cross_entropy")
        if not self.asked and isinstance(self.answers, Given):
            what = "nothing of the teacher is learned"
            yield Conflict("cross_entropy", what, "lower it, or set answers: teacher", "answers")
        if self.sampling.n > 1:
            yield Conflict("sampling.n", "one answer to each prompt is learned", "drop it")
        for key in ("add_tokens", "add_special_tokens"):
            if getattr(self.model, key):
                yield Conflict(f"model.{key}", "the teacher does not know new tokens", f"drop {key}", "teacher")
        made = self.cached is not None or not isinstance(self.answers, Given)
        if self.data.streaming and made:
            what, key = "rows are asked for before training", "answers" if self.cached is None else "cached"
            yield Conflict("data.streaming", what, "leave data.streaming out", key)
        if self.parallel.strategy.kind not in ("auto", "single"):
            what = "a student is taught by one process"
            yield Conflict("parallel.strategy", what, "drop parallel", "kind")

    def others(self) -> dict[str, ModelRef]:
        """The teacher."""
        return {"teacher": self.teacher}

    def run(self, run: Run) -> Artifact:
        """Trains the student."""
        if run.ranks.world > 1:
            raise RecipeError(f"{run.ranks.world} ranks, and a student is taught by one", fix="run one process")
        return super().run(run)

    def cost(self, shape: Shape) -> Cost:
        """What is trained, and what compares it with the teacher."""
        from llmkit.stages.distilling import beside

        own = self.adapter.cost(shape)
        return replace(own, more=own.more + beside(self, shape))

    def beside(self, world: int) -> tuple[Beside, ...]:
        """The teacher, where its laws are not kept."""
        here = self.asked and self.cached is None
        return (Beside("teacher", self.teacher, "teacher", self.teacher_quant, "frozen"),) if here else ()

    def examples(
        self,
        sources: Sequence[Readable],
        tokenizer: Any,
        key: str,
        aside: Callable[[BadRow], None] | None = None,
        least: int = 1,
    ) -> Prepared:
        """The rows of `data.train` or `data.valid` (`key`), or what they ask where the teacher answers.

        Raises:
            DataError: a row cannot be read, too many are unusable, or too few are left.
        """
        return self.answers.examples(self.data, sources, tokenizer, key, aside, least)

    def answered(self, prepared: Prepared, run: Run, key: str) -> Prepared:
        """The same with the teacher's answers, where those are learned; its laws of them are kept, where they are.

        Raises:
            ModelError: the teacher has another tokenizer.
        """
        from llmkit.stages.distilling import check_words, keep

        check_words(self, run)
        if isinstance(self.answers, OfTeacher):
            from llmkit.stages.answers import own_answers

            longest, quant = self.data.max_length, self.teacher_quant
            how, types = self.answers, self.types_name
            prepared = own_answers(prepared, how, self.teacher, types, longest, run, key, quant, "answers")
        if self.cached is not None:
            keep(self, self.cached, prepared, run, key)
        return prepared

    def around(self, built: Built, train: Prepared, run: Run) -> Built:
        """The student beside its teacher, or beside what is kept of it."""
        from llmkit.stages.distilling import around

        return around(self, built, run.scratch) if self.asked else built

    def feeding(self, job: Job, built: Built, steps: Steps) -> AbstractContextManager[Feed]:
        """Rows, and what the student says itself."""
        from llmkit.stages.measured import said
        from llmkit.stages.sampled import Sampled

        if not self.on_policy:
            return nullcontext(job.feed)
        write, longest = partial(said, job, built, steps), self.data.max_length
        return nullcontext(Sampled(job.feed, write, self.on_policy, self.sampling, longest, self.seed))

    def objective(self, train: Prepared) -> Loss:
        """The loss with its share of cross-entropy."""
        return Distillation(self.cross_entropy) if self.asked else CrossEntropy()

    def measure(self, subject: Subject, valid: Prepared, ids: Sequence[int]) -> dict[str, float]:
        """The figures (`valid.*`) of these validation rows."""
        from llmkit.evals.summed import held_out_sums

        if not self.asked:
            figures = super().measure(subject, valid, ids)
            return figures | {"valid.nll": figures["valid.loss"]}
        return held_out_sums(subject, self.objective(valid), valid, ids, self.data.max_length)
