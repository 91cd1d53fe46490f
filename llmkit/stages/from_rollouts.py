"""What stages share that learn from the model's own answers: how it answers, what answers are worth, what it is not to
leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.core.config import Conflict, config
from llmkit.core.convert import under
from llmkit.core.errors import RecipeError
from llmkit.plan.beside import Beside, Round
from llmkit.rl.rewards_node import Reward, files_of, models_of, placed
from llmkit.rl.rollout_node import Rollout
from llmkit.stages.branching import branching
from llmkit.stages.drawn_limits import limits
from llmkit.stages.reference import AdapterOff, Second
from llmkit.stages.training import KNOB, Training
from llmkit.train.node import Guard

if TYPE_CHECKING:
    from llmkit.build.training import Built
    from llmkit.core.artifact import Artifact
    from llmkit.core.ranks import Ranks
    from llmkit.core.run import Run
    from llmkit.data.asked import Asked
    from llmkit.data.node import Readable
    from llmkit.data.order import Ordered
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow
    from llmkit.evals.run import Subject
    from llmkit.models.node import ModelRef
    from llmkit.models.resolve import Resolved

ENGINE = "engine weights"
"""What the account calls the copy that answers are drawn from."""
SLOWER = "answers are drawn in more turns"


@config
class FromRollouts(Training):
    """A stage whose steps draw what they learn from."""

    larger_is_better: ClassVar[Mapping[str, bool]] = {"valid.reward": True}
    price_key: ClassVar[str]
    """The key of what a divergence from the reference costs."""
    shown: ClassVar[tuple[str, ...]] = ("reward", "kl")
    rollout: Rollout = Rollout()
    reward: tuple[Reward, ...]
    """What answers are worth: the weighted sum of these."""
    reference: AdapterOff | Second = AdapterOff()
    """What the policy is not to leave, where a price says what that costs."""
    share_prompts: bool = True
    """A prompt is computed once for its answers, where the model's attention can: with equal gradients, in fewer
    tokens."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        yield from super().problems()
        if not self.reward:
            yield Conflict("reward", "nothing says what an answer is worth", "give one or more")
        elif self.rollout.environment is None and not any(one.weight for one in self.reward):
            yield Conflict("reward", "all weights are 0: nothing says what an answer is worth", "give one a weight")
        if self.rollout.max_tokens >= self.data.max_length:
            what = f"answers of {self.rollout.max_tokens} tokens leave no room for prompts"
            yield Conflict("rollout.max_tokens", what, "lower it, or raise data.max_length", "data.max_length")
        if self.rollout.parts > self.batch.examples:
            what = f"{self.batch.examples} prompts are no {self.rollout.parts} parts"
            yield Conflict("rollout.parts", what, "lower it, or raise batch.prompts", "batch.prompts")
        yield from limits(self)

    @property
    def priced(self) -> bool:
        """Whether it costs anything: without that no reference is asked."""
        raise NotImplementedError

    @property
    def counted(self) -> Literal["rows", "pairs", "prompts"]:
        """Prompts."""
        return "prompts"

    @property
    def step_examples(self) -> int:
        """A part of the prompts."""
        return -(-self.batch.examples // self.rollout.parts)

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row: a prompt with all its answers fills one."""
        return self.rollout.group * self.data.max_length

    @property
    def example_tokens(self) -> int:
        """A prompt with all its answers, which has it once where it is shared."""
        rollout, longest = self.rollout, self.data.max_length
        return rollout.group * longest - (rollout.group - 1) * (longest - rollout.max_tokens) * self.share_prompts

    def beside(self, world: int) -> tuple[Beside, ...]:
        """A second reference, who scores answers, and of weights that are cut the engine's whole copy."""
        made = [*self.reference.held(drawn=1)] if self.priced else []
        for place, reward in placed(self.reward):
            made += [replace(one, key=under(place, one.key)) for one in reward.beside()]
        return (*made, *([Beside(ENGINE, adapter=self.adapter)] if self._copied(world) else []))

    def draws(self, world: int) -> Round | None:
        """The answers of a step, unless a server draws them; by their log-probabilities ratios and divergences are
        told."""
        rollout = self.rollout
        if rollout.vllm is not None:
            return None
        return Round(
            rollout.engine.cache,
            rollout.engine.sequences,
            rollout.engine.tokens,
            self.batch.examples,
            rollout.group,
            self.data.max_length - rollout.max_tokens,
            rollout.max_tokens,
            rollout.steps,
            self.passes,
            self._copied(world) or bool(rollout.ranks),
            rollout.ranks,
        )

    @property
    def below(self) -> bool:
        """Whether the reference is what lies below the policy's adapter."""
        return self.priced and not self.reference.held()

    @property
    def passes(self) -> int:
        """Forward passes of what is trained over answers before a step learns from them."""
        raise NotImplementedError

    def _copied(self, world: int) -> bool:
        """Whether the engine has a model of its own: ranks have parts of the weights, or these are updated while it
        draws, where what is frozen is there once."""
        own = self.rollout.asynchronous and not self.adapter.frozen_base
        here = self.rollout.vllm is None and not self.rollout.ranks
        return here and (not self.parallel.at_hand(world) or bool(own))

    @property
    def aside(self) -> int:
        """Those that only draw."""
        return self.rollout.ranks

    def check_ranks(self, ranks: Ranks) -> None:
        """Some are left to train, and all are where messages between both sides were tried.

        Raises:
            RecipeError: the recipe does not go with so many.
        """
        aside, key = self.aside, "rollout.ranks"
        if aside >= ranks.world:
            what = f"{aside} of {ranks.world} ranks only draw, and none is left to train"
            raise RecipeError(what, fix=f"start {aside + 1} or more, or set rollout.ranks=0", key=key)
        if aside and ranks.here < ranks.world:
            what = f"{ranks.world} ranks on hosts of {ranks.here}, and those that only draw are on one with the others"
            raise RecipeError(what, fix="use one host, or set rollout.ranks=0", key=key)
        self.parallel.check(ranks.world - aside, self.deterministic)

    def run(self, run: Run) -> Artifact:
        """Trains, or draws for those who do."""
        apart = run.peers.apart
        if apart is None or apart.trains:
            return super().run(run)
        from llmkit.stages.drawing_apart import draw_apart

        return draw_apart(self, run, apart)

    def moves(self) -> Iterator[tuple[str, Mapping[str, Any], str]]:
        """Fewer answers at once, fewer to a prompt, shorter ones."""
        rollout = self.rollout
        most = min(rollout.engine.sequences, self.batch.examples * rollout.group)
        if most > 8 and rollout.vllm is None:
            engine = replace(rollout.engine, sequences=most // 4)
            yield f"rollout.engine.sequences={most // 4}", {"rollout": replace(rollout, engine=engine)}, SLOWER
        if rollout.group >= 4:
            less = replace(rollout, group=rollout.group // 2)
            yield f"rollout.group={rollout.group // 2}", {"rollout": less}, "fewer answers to compare"
        if rollout.max_tokens >= 64:
            less = replace(rollout, max_tokens=rollout.max_tokens // 2)
            data = replace(self.data, max_length=self.data.max_length - rollout.max_tokens // 2)
            keys = f"rollout.max_tokens={less.max_tokens} data.max_length={data.max_length}"
            yield keys, {"rollout": less, "data": data}, "shorter answers"

    @property
    def knob(self) -> str:
        """What to do where memory gives out."""
        return f"lower rollout.engine.sequences, rollout.group or rollout.max_tokens, or {KNOB}"

    def others(self) -> dict[str, ModelRef]:
        """The reference, where it is another model, and those that say what answers are worth."""
        path = self.reference.path if isinstance(self.reference, Second) else None
        return ({} if path is None else {"reference.path": path}) | models_of(self.reward)

    def files_beside(self) -> dict[str, str]:
        """What rewards and tools read."""
        tools = self.rollout.environment
        read = {} if tools is None else tools.files()
        return files_of(self.reward) | {f"rollout.environment.{key}": path for key, path in read.items()}

    def examples(
        self,
        sources: Sequence[Readable],
        tokenizer: Any,
        key: str,
        aside: Callable[[BadRow], None] | None = None,
        least: int = 1,
    ) -> Asked:
        """The prompts of `data.train` or `data.valid` (`key`), at least `least` of them; bad rows go `aside`.

        Raises:
            DataError: a row cannot be read or lacks what rewards read, too many are unusable, or too few are left.
        """
        from llmkit.data.asked import asked_of
        from llmkit.rl.columns import check_columns

        made = asked_of(sources, self.data, tokenizer, key, aside, least)
        check_columns(self.reward, made.columns, made.places)
        return made

    def reaches(self, resolved: Resolved, made: Prepared) -> None:
        """
        Raises:
            RecipeError: the engine would have to draw past the model's positions.
        """
        from llmkit.stages.reach import check_reach

        check_reach(self, resolved, made)

    def order(self, train: Prepared) -> Ordered:
        """Which prompts each step sees: the same as often as answers are used."""
        from llmkit.data.order import Repeated

        return Repeated(super().order(train), self.rollout.steps)

    def around(self, built: Built, train: Prepared, run: Run) -> Built:
        """The policy, in whose forward nothing is random."""
        from llmkit.models.quiet import quiet

        quiet(built.model)
        return branching(built, self.share_prompts, self.data.max_length)

    @property
    def watched(self) -> Guard:
        """Not how large the loss is: advantages sum to about 0, and it is anything near that."""
        return replace(self.guard, spike=0.0)

    def measure(self, subject: Subject, valid: Prepared, ids: Sequence[int]) -> dict[str, float]:
        """The figures (`valid.*`) of the likeliest answers to these validation prompts."""
        from llmkit.stages.judged import judged

        return judged(self, subject, valid, ids)
