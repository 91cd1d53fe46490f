"""The recipe's `reference` node: what a policy is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llmkit.core.config import config
from llmkit.models.node import ModelRef
from llmkit.plan.beside import Beside

if TYPE_CHECKING:
    from llmkit.build.training import Built
    from llmkit.core.run import Run
    from llmkit.data.groups import Groups
    from llmkit.stages.preference import Preference


class Nothing:
    """The answers of a reference that has nothing to say."""

    forwards: ClassVar[int] = 0
    """Forward passes that it takes in a step."""

    def known(self, stage: Preference, groups: Groups, run: Run, key: str) -> Groups:
        """The examples, with what is known of the reference before training."""
        return groups

    def beside(self, stage: Preference, built: Built, run: Run) -> Built:
        """What is trained, with the reference in its forward."""
        return built

    def held(self, drawn: int = 0) -> tuple[Beside, ...]:
        """The models that it holds; `drawn` is how often they are asked for what a step drew."""
        return ()


@config
class AdapterOff(Nothing):
    """The model without its adapter: no second one is held."""

    forwards: ClassVar[int] = 1
    kind: Literal["adapter_off"] = "adapter_off"

    def beside(self, stage: Preference, built: Built, run: Run) -> Built:
        """The policy and itself without its adapter."""
        from llmkit.stages.referring import beside

        return beside(built, None)


@config
class Second(Nothing):
    """A second model that stays as it is."""

    forwards: ClassVar[int] = 1
    kind: Literal["model"] = "model"
    path: ModelRef | None = None
    """Which; left out, the stage's own as it was before training."""

    def beside(self, stage: Preference, built: Built, run: Run) -> Built:
        """The policy and the other model."""
        from llmkit.stages.referring import beside, loaded

        return beside(built, loaded(stage, self.path or stage.model, run))

    def held(self, drawn: int = 0) -> tuple[Beside, ...]:
        """This one."""
        return (Beside("reference", self.path, "reference.path", passes=drawn),)


@config
class Precomputed(Nothing):
    """The log-probabilities of a model, made once before training and kept beside the run: it is not held meanwhile."""

    kind: Literal["precomputed"] = "precomputed"
    path: ModelRef | None = None
    """Which; left out, the stage's own as it was before training."""

    def known(self, stage: Preference, groups: Groups, run: Run, key: str) -> Groups:
        """The examples with the reference's log-probability of each token."""
        from llmkit.stages.referring import computed

        return computed(stage, self.path or stage.model, groups, run, key)


Reference = AdapterOff | Second | Precomputed
