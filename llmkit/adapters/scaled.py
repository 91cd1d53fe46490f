"""Methods that learn vectors: IA3 and VeRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from llmkit.adapters.method import Around, Method
from llmkit.adapters.names import linears, meant
from llmkit.core.config import config, setting
from llmkit.core.shape import Cost, Shape

if TYPE_CHECKING:
    from torch import nn

KEYS_AND_VALUES = ("k_proj", "v_proj", "kv_b_proj", "qkv_proj", "query_key_value", "Wqkv", "attn.c_attn")
"""What the linears are called whose outputs are keys or values; of fused ones, queries too."""


@config
class Ia3(Method):
    """Learned factors of keys, values and what the MLP's last linear reads (IA3, arXiv:2205.05638), through peft."""

    kind: Literal["ia3"] = "ia3"
    targets: Literal["auto"] | str | tuple[str, ...] = "auto"
    """`auto` (keys, values and the MLP's last linear; of fused projections the whole one; experts that are bare
    parameters have none), a regular expression over module paths, or a list of name endings."""
    feedforward: tuple[str, ...] = ("down_proj", "fc2", "dense_4h_to_h", "fc_out", "mlp.c_proj")
    """Endings of the targets whose input is scaled; of the others it is the output."""

    def attach(self, model: Any, around: Around = Around()) -> nn.Module:
        """Freezes the base and puts factors of 1 at its targets: nothing changes at first.

        Raises:
            ModelError: `targets` names no linear of this model.
        """
        from llmkit.adapters.tuned import ia3

        adapted: nn.Module = ia3(model, self, around)
        return adapted

    def cost(self, shape: Shape) -> Cost:
        """One factor for each output, or input of the MLP's last linear."""
        wanted = (*KEYS_AND_VALUES, *self.feedforward) if self.targets == "auto" else self.targets
        found = linears(shape, wanted).items()
        return Cost(sum(i if meant(self.feedforward, name) else o for name, (i, o) in found), own=(4, 3, 4))


@config
class Vera(Method):
    """Random low-rank matrices that all linears share, with learned scales (VeRA, arXiv:2310.11454), through peft."""

    kind: Literal["vera"] = "vera"
    rank: int = setting(default=256, least=1)
    """Width of the shared matrices; a linear has rank + out parameters, so it can be far larger than LoRA's."""
    dropout: float = setting(default=0.0, least=0.0, below=1.0)
    d_initial: float = setting(default=0.1, above=0.0)
    """What the scales of the inner width begin with; those of the output begin with 0."""
    projection_prng_key: int = setting(default=0, least=0)
    """The seed of the shared matrices, which are saved too."""
    targets: Literal["all-linear"] | str | tuple[str, ...] = "all-linear"
    """`all-linear` (all but the head and routers), a regular expression over module paths, or a list of name
    endings."""

    def attach(self, model: Any, around: Around = Around()) -> nn.Module:
        """Freezes the base and puts scales that begin with 0 beside its targets: nothing changes at first.

        Raises:
            ModelError: `targets` names no linear of this model.
        """
        from llmkit.adapters.tuned import vera

        adapted: nn.Module = vera(model, self, around)
        return adapted

    def cost(self, shape: Shape) -> Cost:
        """rank + out of each linear; the shared matrices are as wide as the widest."""
        found = list(linears(shape, self.targets).values()) or [(0, 0)]
        shared = self.rank * (max(i for i, _ in found) + max(o for _, o in found))
        return Cost(sum(self.rank + o for _, o in found), more=shared, low=2 * self.rank, own=(7, 4, 4))
