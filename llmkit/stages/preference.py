"""`kind: preference`: a policy learns from pairs of a chosen and a rejected completion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.adapters.limits import virtual_tokens
from llmkit.core.config import Conflict, config
from llmkit.losses.kto_node import Kto
from llmkit.losses.preference_node import PreferenceLoss
from llmkit.losses.referred_node import Dpo
from llmkit.stages.branching import branching, shares
from llmkit.stages.reference import AdapterOff, Reference
from llmkit.stages.training import Training

if TYPE_CHECKING:
    from llmkit.build.training import Built
    from llmkit.core.records import Prediction
    from llmkit.core.run import Run
    from llmkit.core.types import Report
    from llmkit.data.groups import Groups
    from llmkit.data.node import Readable
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow
    from llmkit.evals.run import Subject
    from llmkit.losses.kto import Unpaired
    from llmkit.losses.pairwise import Pairwise
    from llmkit.models.load import Loaded
    from llmkit.models.node import ModelRef
    from llmkit.parallel.steps import Loss
    from llmkit.plan.beside import Beside


@config
class Preference(Training):
    """Preference learning from pairs.

    Rows hold `prompt`, `chosen` and `rejected`, as text or as messages, the prompt left out where both begin with it;
    or transcripts of hh-rlhf. For `kto` they hold `prompt`, `completion` and `label`, which is true or false."""

    larger_is_better: ClassVar[Mapping[str, bool]] = {
        "valid.loss": False,
        "valid.accuracy": True,
        "valid.reward_margin": True,
        "valid.length_controlled_accuracy": True,
    }
    shown: ClassVar[tuple[str, ...]] = ("accuracy", "reward_margin")
    kind: Literal["preference"] = "preference"
    loss: PreferenceLoss | Kto = Dpo()
    """What is made small, over pairs, or with `kto` over completions that are good or bad each by itself; its kind may
    stand in the place of `preference`: `kind: dpo`."""
    reference: Reference = AdapterOff()
    """What the policy is compared with; losses without a reference ask nobody."""
    share_prompts: bool = True
    """A prompt is computed once for its completions, where the model's attention can: with equal gradients, in fewer
    tokens."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        yield from super().problems()
        yield from self._odd_reference()
        data = self.data
        for key, odd in (("streaming", data.streaming), ("decontaminate", bool(data.decontaminate))):
            if odd:
                yield Conflict(
                    f"data.{key}",
                    "pairs are read whole and are not compared with others yet",
                    f"drop data.{key}",
                    "kind",
                )
        if data.dedup.kind != "none":
            yield Conflict("data.dedup", "pairs are not compared with others yet", "drop data.dedup", "kind")
        if data.overflow == "split":
            yield Conflict("data.overflow", "a preference is of a whole completion", "use drop or truncate", "kind")
        if data.train_on != "assistant":
            yield Conflict("data.train_on", "completions are compared as wholes", "drop data.train_on", "kind")
        for name in ("context", "pipeline"):
            if getattr(self.parallel, name) > 1:
                what = "a pair's two sums are made on one rank"
                yield Conflict(f"parallel.{name}", what, f"set parallel.{name}=1", "kind")
        if self.whole_step and isinstance(self.micro_batch, int) and self.micro_batch < self.batch.examples:
            what = f"loss {self.loss.kind} compares all pairs of a step"
            yield Conflict("micro_batch", what, "set micro_batch=batch.pairs, or auto", "loss.kind")

        if self.needs_distance:
            yield from self._odd_distance()

    def _odd_distance(self) -> Iterator[Conflict]:
        """What the baseline of KTO cannot be made of."""
        if self.batch.examples < 2:
            what = "kto compares with prompts that have the completions of others, and a step has one"
            yield Conflict("batch.rows", what, "use 2 or more", "loss.kind")
        if self.reference.kind == "precomputed":
            what = "each step asks the reference of other completions than the rows have"
            yield Conflict("reference.kind", what, "set reference: model, or loss.variant=apo_zero", "loss.kind")

    def _odd_reference(self) -> Iterator[Conflict]:
        reference, adapter = self.reference, self.adapter
        if not self.loss.needs_reference:
            if reference != AdapterOff():
                yield Conflict(
                    "reference", f"loss {self.loss.kind} compares with nothing", "drop reference", "loss.kind"
                )
            return
        if not isinstance(reference, AdapterOff):
            return
        fix = "set reference: precomputed, or reference: model"
        if not adapter.frozen_base:
            yield Conflict("reference.kind", "adapter none leaves nothing of the model as it was", fix, "adapter.kind")
        elif virtual_tokens(adapter):
            what = f"{adapter.kind} cannot be put aside for a forward"
            yield Conflict("reference.kind", what, fix, "adapter.kind")

    @property
    def counted(self) -> Literal["rows", "pairs"]:
        """Pairs, or single completions."""
        return "rows" if isinstance(self.loss, Kto) else "pairs"

    @property
    def counts(self) -> tuple[str, str]:
        """The loss, where it is one of single completions."""
        return ("loss.kind", "loss kto") if isinstance(self.loss, Kto) else super().counts

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row: two completions of `data.max_length` with a prompt each fill one."""
        return (1 if isinstance(self.loss, Kto) else 2) * self.data.max_length

    @property
    def needs_distance(self) -> bool:
        """Of KTO, whose baseline is of the whole step."""
        return isinstance(self.loss, Kto) and self.loss.needs_baseline

    def beside(self, world: int) -> tuple[Beside, ...]:
        """A second model, where that is the reference."""
        return self.reference.held() if self.loss.needs_reference else ()

    def others(self) -> dict[str, ModelRef]:
        """The reference, where it is another model."""
        path = getattr(self.reference, "path", None)
        return {} if path is None else {"reference.path": path}

    @property
    def forwards_beside(self) -> int:
        """The reference's, where it is asked in each step."""
        return self.reference.forwards if self.loss.needs_reference else 0

    @property
    def whole_step(self) -> bool:
        """Whether the loss compares all pairs of a step."""
        return self.loss.whole_step

    def shares(self, loaded: Loaded) -> bool:
        """Whether prompts are computed once: where rotations follow a sequence's length, longer ones must not be."""
        return shares(loaded, self.share_prompts, self.data.max_length)

    def examples(
        self,
        sources: Sequence[Readable],
        tokenizer: Any,
        key: str,
        aside: Callable[[BadRow], None] | None = None,
        least: int = 1,
    ) -> Groups:
        """The pairs of `data.train` or `data.valid` (`key`), at least `least` of them; bad rows go `aside`.

        Raises:
            DataError: a row cannot be read, too many are unusable, or too few are left.
        """
        from llmkit.data.groups import grouped

        counted = "rows" if self.batch.pairs is None else "pairs"
        made = grouped(sources, self.data, tokenizer, key, aside, least, counted=counted)
        made.check_offers(1 if isinstance(self.loss, Kto) else 2, self.loss.kind, key)
        made.check_doubts(getattr(self.loss, "doubts", False), self.loss.kind, key)
        return made

    def answered(self, prepared: Prepared, run: Run, key: str) -> Prepared:
        """The pairs with what the reference says of them, where that is made before training."""
        return self.reference.known(self, self._groups(prepared), run, key) if self.loss.needs_reference else prepared

    def around(self, built: Built, train: Prepared, run: Run) -> Built:
        """The policy, with its reference where that runs beside it."""
        if run.main and isinstance(self.loss, Kto) and len(held := set(self._groups(train).per["label"].tolist())) == 1:
            label = "true" if held.pop() else "false"
            what = "kto tells good completions from bad ones, and these are all of one kind"
            run.console.notice(f"data.train: label is {label} in every row: {what}")
        built = branching(built, self.share_prompts, self.data.max_length)
        return self.reference.beside(self, built, run) if self.loss.needs_reference else built

    def objective(self, train: Prepared) -> Loss:
        """The loss over pairs."""
        return self.judge

    @property
    def judge(self) -> Pairwise | Unpaired:
        """The loss over batches of pairs, or of single completions."""
        from llmkit.losses.kto import Unpaired
        from llmkit.losses.pairwise import Pairwise

        return Unpaired(self.loss) if isinstance(self.loss, Kto) else Pairwise(self.loss)

    def measure(self, subject: Subject, valid: Prepared, ids: Sequence[int]) -> dict[str, float]:
        """The figures (`valid.*`) of these validation pairs."""
        from llmkit.evals.preferences import preferred
        from llmkit.evals.unpaired import rated
        from llmkit.losses.kto import Unpaired

        judge, groups = self.judge, self._groups(valid)
        if isinstance(judge, Unpaired):
            return rated(subject, judge, groups, ids, self.row_tokens)
        return preferred(subject, judge, groups, ids, self.row_tokens)

    def final(self, subject: Subject, valid: Prepared) -> tuple[list[Prediction], list[Report]]:
        """A table of what the result prefers, and its figures with intervals."""
        from llmkit.data.order import spread
        from llmkit.evals import preferences, unpaired
        from llmkit.losses.kto import Unpaired

        judge, groups, ids = self.judge, self._groups(valid), spread(len(valid), self.evaluate.rows)
        if isinstance(judge, Unpaired):
            return unpaired.concluded(subject, judge, groups, ids, self.row_tokens)
        return preferences.concluded(subject, judge, groups, ids, self.row_tokens)

    def _groups(self, prepared: Prepared) -> Groups:
        from llmkit.data.groups import Groups

        if not isinstance(prepared, Groups):
            raise TypeError("these rows are no groups of completions")
        return prepared
