"""The recipe's `critic` node: what values the states of a policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from llmkit.adapters.limits import virtual_tokens
from llmkit.adapters.node import Adapter, Lora
from llmkit.core.config import Conflict, config, setting
from llmkit.models.node import ModelRef
from llmkit.plan.beside import Beside

if TYPE_CHECKING:
    from llmkit.build.training import Built
    from llmkit.core.run import Run
    from llmkit.core.shape import Cost, Shape
    from llmkit.models.valued import Critic
    from llmkit.stages.ppo import Ppo


@config
class Critical:
    """What all critics share."""

    lr: float | None = setting(default=None, above=0.0)
    """Its own rate; `optim.lr` where nothing is said."""

    @property
    def own(self) -> Any:
        """What is trained of a trunk of its own, beside its head; None where it has none."""
        return None

    def odd(self, policy: Any) -> Iterator[Conflict]:
        """What contradicts what, beside a policy with this adapter."""
        if self.own is None:
            return
        if getattr(self.own, "dropout", 0.0):
            what = "with dropout a critic differs from itself"
            yield Conflict("critic.adapter.dropout", what, "set critic.adapter.dropout=0", "kind")
        if virtual_tokens(self.own) or self.own.kind == "bottleneck" or getattr(self.own, "init", "") == "eva":
            what = f"a critic is not trained by {self.own.kind}" + (" from eva" if hasattr(self.own, "init") else "")
            yield Conflict("critic.adapter.kind", what, "use critic.adapter: {kind: lora}", "kind")

    def beside(self, stage: Ppo, built: Built, run: Run) -> Critic:
        """The critic of a policy that is built."""
        raise NotImplementedError

    def held(self) -> tuple[Beside, ...]:
        """What runs layers of its own beside the policy."""
        return ()

    def cost(self, shape: Shape, policy: Cost) -> Cost:
        """What is trained of the policy and over its states."""
        return policy if self.own is not None else replace(policy, trained=policy.trained + shape.hidden)


@config
class Shared(Critical):
    """A head over the policy's own model: over its hidden states as they are trained, which one forward gives, so that
    values teach the policy too; or, with an `adapter`, over the frozen base with that adapter, which shares the weights
    of the base and nothing else."""

    kind: Literal["shared"] = "shared"
    adapter: Lora | None = None
    """The critic's own."""

    @property
    def own(self) -> Any:
        """The adapter."""
        return self.adapter

    def held(self) -> tuple[Beside, ...]:
        """The second adapter, in layers that run once more."""
        if self.adapter is None:
            return ()
        return (Beside("critic", adapter=self.adapter, learns=True, over=True, passes=1),)

    def odd(self, policy: Any) -> Iterator[Conflict]:
        """What contradicts what, beside a policy with this adapter."""
        yield from super().odd(policy)
        kept = [key for key in ("modules_to_save", "trainable_tokens") if getattr(policy, key, ())]
        if self.adapter is not None and kept:
            what = f"adapter.{kept[0]} trains weights of the base, which is to stay as it was for the critic"
            yield Conflict("critic.adapter", what, f"drop adapter.{kept[0]}, or use critic: {{kind: model}}", "adapter")
        if self.adapter is not None and (not policy.frozen_base or policy.kind == "bottleneck"):
            what = f"adapter {policy.kind} leaves no base as it was, for a second adapter"
            yield Conflict(
                "critic.adapter", what, "use adapter: {kind: lora}, or critic: {kind: model}", "adapter.kind"
            )

    def beside(self, stage: Ppo, built: Built, run: Run) -> Critic:
        """A head, with a second adapter or without."""
        from llmkit.stages.criticising import over_base, over_policy

        return over_policy(built) if self.adapter is None else over_base(stage, self.adapter, built, run)


@config
class Separate(Critical):
    """A model of its own; it may be larger or smaller than the policy, with the same tokens."""

    kind: Literal["model"] = "model"
    path: ModelRef | None = None
    """Which it begins from; a reward model (`kind: reward`) brings its head, any other model a new one. Left out, the
    stage's own."""
    adapter: Adapter = Lora()
    """What is trained of it; `none` trains every weight."""

    @property
    def own(self) -> Any:
        """The adapter."""
        return self.adapter

    def held(self) -> tuple[Beside, ...]:
        """The model, with what is trained of it."""
        return (Beside("critic", self.path, "critic.path", adapter=self.adapter, learns=True, passes=1),)

    def beside(self, stage: Ppo, built: Built, run: Run) -> Critic:
        """The model with its head."""
        from llmkit.stages.criticising import separate

        return separate(stage, self, built, run)


CriticNode = Shared | Separate
