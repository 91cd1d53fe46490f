"""`kind: ppo`: a policy learns from its own answers, token by token, with a critic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar, Literal

from llmkit.core.config import Conflict, config
from llmkit.losses.ppo_node import AdaptiveKl, FixedKl, KlControl, PpoLoss
from llmkit.rl.gae_node import Gae
from llmkit.stages.critic import CriticNode, Shared
from llmkit.stages.from_rollouts import FromRollouts

if TYPE_CHECKING:
    from pathlib import Path

    from llmkit.build.training import Built
    from llmkit.core.run import Run
    from llmkit.core.shape import Cost, Shape
    from llmkit.data.feed import Feed
    from llmkit.data.prepare import Prepared
    from llmkit.models.node import ModelRef
    from llmkit.parallel.steps import Loss, Steps
    from llmkit.plan.beside import Beside
    from llmkit.stages.job import Job


@config
class Ppo(FromRollouts):
    """Proximal policy optimisation (arXiv:1707.06347) from the model's own answers, with a critic: rows hold a `prompt`
    (text or messages) or a conversation whose last answer is left out; their other columns are told to the rewards."""

    price_key: ClassVar[str] = "kl.beta"
    kind: Literal["ppo"] = "ppo"
    critic: CriticNode = Shared()
    """What values the states between tokens."""
    loss: PpoLoss = PpoLoss()
    """What is made small."""
    gae: Gae = Gae()
    """What is made of rewards and values."""
    kl: KlControl = FixedKl()
    """What the divergence from the reference costs each token."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        yield from super().problems()
        yield from self.critic.odd(self.adapter)
        if isinstance(self.kl, AdaptiveKl) and self.batch.examples * self.rollout.group >= 5 * self.kl.horizon:
            what = f"{self.batch.examples * self.rollout.group} completions at once may make the price 0 or less"
            yield Conflict("kl.horizon", what, "raise it", "rollout.group")
        more = self.model.add_tokens or self.model.add_special_tokens
        if more and any(one.over for one in self.critic.held()):
            what = "rows of embeddings are trained for them, in the base that a critic's adapter lies over"
            yield Conflict(
                "critic.adapter", what, "drop critic.adapter, or use critic: {kind: model}", "model.add_tokens"
            )
        if self.parallel.tensor > 1:
            what = "a critic's layers are not dealt out"
            yield Conflict("parallel.tensor", what, "set parallel.tensor=1, and parallel.strategy=fsdp", "kind")
        for key in ("asynchronous", "vllm"):
            if getattr(self.rollout, key):
                what = "values are of the policy that answers were drawn from, in this process"
                yield Conflict(f"rollout.{key}", what, f"drop rollout.{key}, or use kind: policy", "kind")

    @property
    def priced(self) -> bool:
        """Whether it costs anything."""
        return self.kl.beta > 0

    def beside(self, world: int) -> tuple[Beside, ...]:
        """A critic that runs layers of its own too."""
        return (*super().beside(world), *self.critic.held())

    @property
    def passes(self) -> int:
        """By the policy, and below its adapter, where a divergence costs anything."""
        return 1 + int(self.below)

    def cost(self, shape: Shape) -> Cost:
        """What is trained of policy and critic."""
        return self.critic.cost(shape, super().cost(shape))

    def others(self) -> dict[str, ModelRef]:
        """Reference and critic, where they are other models."""
        path = getattr(self.critic, "path", None)
        return super().others() | ({} if path is None else {"critic.path": path})

    def blind(self) -> bool:
        """A critic over the same base looks at it too."""
        return super().blind() and all(one.adapter is None or one.adapter.blind() for one in self.critic.held())

    def rate(self, name: str) -> float:
        """The critic has a rate of its own."""
        from llmkit.stages.criticising import rate

        return rate(self, name)

    def around(self, built: Built, train: Prepared, run: Run) -> Built:
        """The policy with its critic."""
        from llmkit.stages.criticising import around

        return around(self, super().around(built, train, run), run)

    def feeding(self, job: Job, built: Built, steps: Steps) -> AbstractContextManager[Feed]:
        """Rollouts."""
        from llmkit.stages.ppo_taught import ppo_feed

        return ppo_feed(job, built, steps)

    def objective(self, train: Prepared) -> Loss:
        """The loss over rollouts."""
        from llmkit.rl.objective import OverRollouts

        return OverRollouts(self.loss, self.rollout.temperature)

    def leave(self, built: Built, folder: Path, write: Callable[[Path], None]) -> None:
        """Leaves the policy as `folder`, and the critic as `critic/` beside it."""
        from llmkit.stages.criticising import save

        save(self, built, folder.parent / "critic")
        super().leave(built, folder, write)
