"""Bottleneck adapters: ours, for peft has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.adapters.limits import BLOCKS, Limits
from llmkit.adapters.method import Around, Method
from llmkit.core.config import config, setting
from llmkit.core.shape import Cost, Shape

if TYPE_CHECKING:
    from torch import nn


@config
class Bottleneck(Method):
    """Small two-layer blocks after the parts of each layer (adapters, arXiv:1902.00751; after the MLP alone:
    arXiv:2005.00247). llmkit alone loads them: plain peft has no such method."""

    limits: ClassVar[Limits] = Limits(merge=BLOCKS)
    kind: Literal["bottleneck"] = "bottleneck"
    size: int = setting(default=64, least=1)
    """Width m of a block: over a model of width d it has 2 d m + d + m parameters."""
    after: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")
    """After which parts of a layer, before the residual is added."""
    activation: Literal["relu", "gelu", "silu"] = "relu"

    def attach(self, model: Any, around: Around = Around()) -> nn.Module:
        """Freezes the base and puts blocks that begin as the identity into its layers.

        Raises:
            ModelError: a layer has no such part, or one that adds its residual itself.
        """
        from llmkit.adapters.blocks import attach

        adapted: nn.Module = attach(model, self, around)
        return adapted

    def cost(self, shape: Shape) -> Cost:
        """2 d m + d + m of each block."""
        d, m, blocks = shape.hidden, self.size, len(set(self.after)) * shape.layers
        return Cost(blocks * (2 * d * m + d + m), own=(5, 2, 1))
