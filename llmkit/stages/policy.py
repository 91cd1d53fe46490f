"""`kind: policy`: a policy learns from its own answers by what they are worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar, Literal

from llmkit.core.config import Conflict, config
from llmkit.losses.policy_node import Grpo, PolicyLoss
from llmkit.stages.from_rollouts import FromRollouts

if TYPE_CHECKING:
    from llmkit.build.training import Built
    from llmkit.data.feed import Feed
    from llmkit.data.prepare import Prepared
    from llmkit.parallel.steps import Loss, Steps
    from llmkit.stages.job import Job


@config
class Policy(FromRollouts):
    """Reinforcement learning from groups of the model's own answers: rows hold a `prompt` (text or messages) or a
    conversation whose last answer is left out; their other columns are told to the rewards."""

    price_key: ClassVar[str] = "loss.beta"
    kind: Literal["policy"] = "policy"
    loss: PolicyLoss = Grpo()
    """What is made small, over completions with advantages."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        yield from super().problems()
        grouped = ("group", "centred", "group_batch", "leave_one_out")
        if self.rollout.group == 1 and self.loss.advantage in grouped:
            what = f"advantage {self.loss.advantage} compares the answers of a group"
            yield Conflict("rollout.group", what, "draw 2 or more, or set loss.advantage=batch", "loss.advantage")

    @property
    def priced(self) -> bool:
        """Whether it costs anything, or the loss reads what the reference says."""
        return self.loss.compares

    @property
    def passes(self) -> int:
        """By the policy itself, and below its adapter, where ratios and divergences ask for them; of answers that are
        drawn ahead by the weights that drew too."""
        return int(self.asks_old) + int(self.below) + self.rollout.asynchronous

    @property
    def asks_old(self) -> bool:
        """Whether a step has to know what the policy said before it: later steps do, and a price within the reward."""
        return self.rollout.steps > 1 or (self.loss.beta > 0 and self.loss.penalty == "reward")

    def feeding(self, job: Job, built: Built, steps: Steps) -> AbstractContextManager[Feed]:
        """Rollouts."""
        from llmkit.stages.policy_taught import policy_feed

        return policy_feed(job, built, steps)

    def objective(self, train: Prepared) -> Loss:
        """The loss over rollouts."""
        from llmkit.rl.objective import OverRollouts

        return OverRollouts(self.judge, self.rollout.temperature)

    @property
    def judge(self) -> PolicyLoss:
        """The loss, for answers of this length."""
        return self.loss.within(self.rollout.max_tokens)
