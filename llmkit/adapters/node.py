"""The recipe's `adapter` node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from llmkit.adapters.bottleneck import Bottleneck
from llmkit.adapters.method import Around, Method
from llmkit.adapters.prompts import PrefixTuning, PromptTuning, PTuning
from llmkit.adapters.rotations import Boft, Oft
from llmkit.adapters.scaled import Ia3, Vera
from llmkit.core.config import Later, config, setting
from llmkit.core.shape import Cost, Shape

if TYPE_CHECKING:
    from torch import nn


@config
class NoAdapter(Method):
    """Every weight is trained."""

    frozen_base: ClassVar[bool] = False
    kind: Literal["none"] = "none"

    def attach(self, model: Any, around: Around = Around()) -> nn.Module:
        """Makes every weight trainable but those of idle modules."""
        model.requires_grad_(True)
        for name in around.idle:
            model.get_submodule(name).requires_grad_(False)
        trained: nn.Module = model
        return trained

    def cost(self, shape: Shape) -> Cost:
        """Every weight."""
        return Cost(shape.params, head=True)


@config
class Lora(Method):
    """Low-rank updates beside frozen linears (LoRA, arXiv:2106.09685), through peft and saved in its format."""

    kind: Literal["lora"] = "lora"
    rank: int = setting(default=16, least=1)
    alpha: float = setting(default=32.0, above=0.0)
    """The update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))."""
    dropout: float = setting(default=0.0, least=0.0, below=1.0)
    targets: Literal["all-linear"] | str | tuple[str, ...] = "all-linear"
    """`all-linear` (all but the head and the routers of mixture models), a regular expression over module paths, or a
    list of name endings."""
    dora: bool = False
    """Learn magnitudes apart from directions (DoRA, arXiv:2402.09353)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
    init: Annotated[Literal["default"], Later(("pissa", "loftq", "olora", "eva"))] = "default"

    def attach(self, model: Any, around: Around = Around()) -> nn.Module:
        """Freezes the base and puts LoRA beside the linears that `targets` names, but for those of idle modules.

        Raises:
            ModelError: `targets` names no linear of this model.
        """
        from llmkit.adapters.lora import attach

        adapted: nn.Module = attach(model, self, around.idle)
        return adapted

    def cost(self, shape: Shape) -> Cost:
        """rank x (in + out) of each linear."""
        keeps: Literal["shared", "input", "scaled"] = "scaled" if self.dora else "input" if self.dropout else "shared"
        return Cost(self.rank * shape.linears, low=self.rank, keeps=keeps)


Adapter = NoAdapter | Lora | Ia3 | Vera | Oft | Boft | PromptTuning | PrefixTuning | PTuning | Bottleneck
