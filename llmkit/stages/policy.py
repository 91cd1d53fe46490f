"""`kind: policy`: a policy learns from its own answers by what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.adapters.limits import virtual_tokens
from llmkit.adapters.node import Lora
from llmkit.core.config import Conflict, config
from llmkit.losses.policy_node import Grpo, PolicyLoss
from llmkit.plan.beside import Beside, Round
from llmkit.rl.rewards_node import Reward, files_of, models_of
from llmkit.rl.rollout_node import Rollout
from llmkit.stages.branching import branching
from llmkit.stages.reference import AdapterOff, Second
from llmkit.stages.training import KNOB, Training
from llmkit.train.node import Guard

if TYPE_CHECKING:
    from llmkit.build.training import Built
    from llmkit.core.run import Run
    from llmkit.data.asked import Asked
    from llmkit.data.feed import Feed
    from llmkit.data.node import Readable
    from llmkit.data.order import Ordered
    from llmkit.data.prepare import Prepared
    from llmkit.data.rows import BadRow
    from llmkit.evals.run import Subject
    from llmkit.models.node import ModelRef
    from llmkit.parallel.steps import Loss, Steps
    from llmkit.stages.job import Job

ENGINE = "engine weights"
"""What the account calls the copy that answers are drawn from."""
SLOWER = "answers are drawn in more turns"


@config
class Policy(Training):
    """Reinforcement learning from groups of the model's own answers: rows hold a `prompt` (text or messages) or a
    conversation whose last answer is left out; their other columns are told to the rewards."""

    larger_is_better: ClassVar[Mapping[str, bool]] = {"valid.reward": True}
    kind: Literal["policy"] = "policy"
    rollout: Rollout = Rollout()
    reward: tuple[Reward, ...]
    """What answers are worth: the weighted sum of these."""
    loss: PolicyLoss = Grpo()
    """What is made small, over completions with advantages."""
    reference: AdapterOff | Second = AdapterOff()
    """What the policy is not to leave, where `loss.beta` says what that costs."""
    share_prompts: bool = True
    """A prompt is computed once for its answers, where the model's attention can: with equal gradients, in fewer
    tokens."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        yield from super().problems()
        if not self.reward:
            yield Conflict("reward", "nothing says what an answer is worth", "give one or more")
        if self.rollout.max_tokens >= self.data.max_length:
            what = f"answers of {self.rollout.max_tokens} tokens leave no room for prompts"
            yield Conflict("rollout.max_tokens", what, "lower it, or raise data.max_length", "data.max_length")
        grouped = ("group", "centred", "group_batch", "leave_one_out")
        if self.rollout.group == 1 and self.loss.advantage in grouped:
            what = f"advantage {self.loss.advantage} compares the answers of a group"
            yield Conflict("rollout.group", what, "draw 2 or more, or set loss.advantage=batch", "loss.advantage")
        yield from self._odd_reference()
        yield from self._odd_forwards()
        yield from self._odd_server()
        yield from self._odd_prompts()

    def _odd_reference(self) -> Iterator[Conflict]:
        if not self.loss.beta:
            if self.reference != AdapterOff():
                yield Conflict(
                    "reference", "a divergence costs nothing", "set loss.beta, or drop reference", "loss.beta"
                )
        elif isinstance(self.reference, AdapterOff) and not self.adapter.frozen_base:
            what, fix = "adapter none leaves nothing of the model as it was", "set reference: model, or loss.beta=0"
            yield Conflict("reference.kind", what, fix, "adapter.kind")
        if virtual_tokens(self.adapter):
            what = f"{self.adapter.kind} puts tokens of its own before a row, which the engine does not"
            yield Conflict("adapter.kind", what, "use adapter: {kind: lora}", "kind")

    def _odd_forwards(self) -> Iterator[Conflict]:
        """What would make a policy differ from itself."""
        if getattr(self.adapter, "dropout", 0.0):
            what = "with dropout a policy differs from itself, and a ratio from 1"
            yield Conflict("adapter.dropout", what, "set adapter.dropout=0", "kind")
        if self.neftune:
            yield Conflict("neftune", "with noise a policy differs from itself", "drop neftune", "kind")
        if getattr(self.adapter, "init", "default") == "eva":
            what = "there are no answers yet that it could begin from"
            yield Conflict("adapter.init", what, "use another init", "kind")
        for name in ("context", "pipeline", "expert"):
            if getattr(self.parallel, name) > 1:
                what = "answers are drawn and learned from by ranks that each run whole rows through all layers"
                yield Conflict(f"parallel.{name}", what, f"set parallel.{name}=1", "kind")

    def _odd_server(self) -> Iterator[Conflict]:
        """What a vLLM server cannot be told."""
        adapter = self.adapter
        if self.rollout.vllm is None or not adapter.frozen_base:
            return
        kept = ("init", "dora", "lora_fa", "modules_to_save", "parameters", "trainable_tokens")
        other = [key for key in kept if adapter.kind == "lora" and getattr(adapter, key) != getattr(Lora(), key)]
        if adapter.kind != "lora" or other:
            key = f"adapter.{other[0] if other else 'kind'}"
            what = "vllm reads two factors of each linear, over the model as it is"
            yield Conflict(key, what, "use adapter: {kind: lora} without it, or the engine", "rollout.vllm")

    def _odd_prompts(self) -> Iterator[Conflict]:
        data = self.data
        odd = {"streaming": data.streaming, "decontaminate": bool(data.decontaminate)}
        odd |= {"dedup": data.dedup.kind != "none", "lint": data.lint.level == "error"}
        odd |= {"mix": data.mixed}
        for key in (key for key, said in odd.items() if said):
            yield Conflict(f"data.{key}", "prompts are read whole and as they are", f"drop data.{key}", "kind")
        if self.rollout.environment is not None and self.rollout.stop:
            yield Conflict("rollout.stop", "calls end where the template says", "drop it", "rollout.environment")
        if self.rollout.environment is not None and data.sources("valid"):
            what = "evaluations ask once, without tools"
            yield Conflict("data.valid", what, "drop data.valid and data.held_out", "rollout.environment")
        if self.batch.tokens is not None:
            what = "how long a step's answers are is not known before"
            yield Conflict("batch.tokens", what, "use batch.prompts", "kind")
        if data.overflow != type(data).overflow:
            yield Conflict("data.overflow", "prompts that leave no room are left out", "drop data.overflow", "kind")
        if data.train_on != "assistant":
            yield Conflict(
                "data.train_on", "answers are trained, of which rows have none", "drop data.train_on", "kind"
            )

    @property
    def counted(self) -> Literal["rows", "pairs", "prompts"]:
        """Prompts."""
        return "prompts"

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
        made = [*self.reference.held(drawn=1)] if self.loss.beta else []
        made += [one for reward in self.reward for one in reward.beside()]
        return (*made, *([Beside(ENGINE, adapter=self.adapter)] if self._copied(world) else []))

    def draws(self, world: int) -> Round | None:
        """The answers of a step, unless a server draws them; by their log-probabilities ratios and divergences are
        told."""
        rollout, loss = self.rollout, self.loss
        if rollout.vllm is not None:
            return None
        old = rollout.reuse > 1 or (loss.beta > 0 and loss.penalty == "reward")
        below = loss.beta > 0 and not self.reference.held()
        return Round(
            rollout.engine.cache,
            rollout.engine.sequences,
            rollout.engine.tokens,
            self.batch.examples,
            rollout.group,
            self.data.max_length - rollout.max_tokens,
            rollout.max_tokens,
            rollout.reuse,
            int(old) + int(below),
            self._copied(world),
        )

    def _copied(self, world: int) -> bool:
        """Whether the engine has a model of its own: ranks have parts of the weights, or these are updated while it
        draws, where what is frozen is there once."""
        own = self.rollout.asynchronous and not self.adapter.frozen_base
        return self.rollout.vllm is None and (not self.parallel.at_hand(world) or bool(own))

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
            DataError: a row cannot be read, too many are unusable, or too few are left.
        """
        from llmkit.data.asked import asked_of

        return asked_of(sources, self.data, tokenizer, key, aside, least)

    def order(self, train: Prepared) -> Ordered:
        """Which prompts each step sees: the same as often as answers are used."""
        from llmkit.data.order import Repeated

        return Repeated(super().order(train), self.rollout.reuse)

    def around(self, built: Built, train: Prepared, run: Run) -> Built:
        """The policy, in whose forward nothing is random."""
        from llmkit.models.quiet import quiet

        quiet(built.model)
        return branching(built, self.share_prompts, self.data.max_length)

    def feeding(self, job: Job, built: Built, steps: Steps) -> AbstractContextManager[Feed]:
        """Rollouts."""
        from llmkit.stages.policy_taught import policy_feed

        return policy_feed(job, built, steps)

    def objective(self, train: Prepared) -> Loss:
        """The loss over rollouts."""
        from llmkit.rl.objective import OverRollouts

        return OverRollouts(self.judge, self.rollout.temperature)

    @property
    def watched(self) -> Guard:
        """Not how large the loss is: advantages sum to about 0, and it is anything near that."""
        return replace(self.guard, spike=0.0)

    @property
    def judge(self) -> PolicyLoss:
        """The loss, for answers of this length."""
        return self.loss.within(self.rollout.max_tokens)

    def measure(self, subject: Subject, valid: Prepared, ids: Sequence[int]) -> dict[str, float]:
        """The figures (`valid.*`) of the likeliest answers to these validation prompts."""
        from llmkit.stages.judged import judged

        return judged(self, subject, valid, ids)
