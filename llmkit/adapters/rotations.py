"""Methods that turn what linears read: OFT and BOFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from llmkit.adapters.method import Around, Method
from llmkit.adapters.names import linears
from llmkit.core.config import config, setting
from llmkit.core.shape import Cost, Shape

if TYPE_CHECKING:
    from torch import nn


@config
class Oft(Method):
    """Orthogonal rotations of blocks of each linear's input (OFT, arXiv:2306.07280; OFTv2, arXiv:2506.19847), through
    peft."""

    kind: Literal["oft"] = "oft"
    block_size: int = setting(default=32, least=2)
    """Inputs that turn together; it has to divide the width of every target."""
    dropout: float = setting(default=0.0, least=0.0, below=1.0)
    """Share of the blocks that stay as they are in a step."""
    share: bool = False
    """One rotation for all blocks of a linear."""
    cayley_neumann: bool = True
    """Five terms of a series in place of an exact inverse: faster, and orthogonal to rounding only near the start."""
    targets: Literal["all-linear"] | str | tuple[str, ...] = "all-linear"
    """`all-linear` (all but the head and routers), a regular expression over module paths, or a list of name
    endings."""

    def attach(self, model: Any, around: Around = Around()) -> nn.Module:
        """Freezes the base and puts rotations by nothing before its targets: nothing changes at first.

        Raises:
            ModelError: `targets` names no linear of this model, or a block does not divide one.
        """
        from llmkit.adapters.tuned import oft

        adapted: nn.Module = oft(model, self, around)
        return adapted

    def cost(self, shape: Shape) -> Cost:
        """b (b - 1) / 2 of each block of b."""
        size = self.block_size * (self.block_size - 1) // 2
        widths = [i for i, _ in linears(shape, self.targets).values()]
        return Cost(sum(size * (1 if self.share else i // self.block_size) for i in widths), own=(5, 3, 2))


@config
class Boft(Method):
    """Rotations by butterfly factors of blocks, and a scale of each output (BOFT, arXiv:2311.06243), through peft."""

    kind: Literal["boft"] = "boft"
    block_size: int = setting(default=4, least=2)
    """Inputs that turn together; it has to divide the width of every target."""
    butterfly_factors: int = setting(default=1, least=1)
    """Factors of the rotation; more than 1 needs peft's CUDA extension."""
    dropout: float = setting(default=0.0, least=0.0, below=1.0)
    """Share of the blocks that stay as they are in a step."""
    targets: Literal["all-linear"] | str | tuple[str, ...] = "all-linear"
    """`all-linear` (all but the head and routers), a regular expression over module paths, or a list of name
    endings."""

    def attach(self, model: Any, around: Around = Around()) -> nn.Module:
        """Freezes the base and puts rotations by nothing before its targets: nothing changes at first.

        Raises:
            ModelError: `targets` names no linear of this model, a block does not divide one, or there is no extension.
        """
        from llmkit.adapters.tuned import boft

        adapted: nn.Module = boft(model, self, around)
        return adapted

    def cost(self, shape: Shape) -> Cost:
        """b b of each block of b and factor, and one for each output; of every linear the permutation, the blocks laid
        out and their product are held."""
        found, times = linears(shape, self.targets).values(), self.butterfly_factors
        trained = sum(times * i * self.block_size + o for i, o in found)
        return Cost(trained, more=sum(3 * times * i * i for i, _ in found), own=(8, 5, 4))
