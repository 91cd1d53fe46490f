"""The recipe's `optim` node: optimizers, and how parameters are grouped for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from llmkit.core.config import Later, config, setting
from llmkit.core.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def _groups(params: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases, magnitudes) do not."""
    matrices = [p for p in params.values() if p.ndim > 1]
    vectors = [p for p in params.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@config
class AdamW:
    """AdamW (arXiv:1711.05101)."""

    moment_bytes: ClassVar[float] = 8.0
    kind: Literal["adamw"] = "adamw"
    lr: float = setting(default=2e-4, above=0.0)
    weight_decay: float = setting(default=0.0, least=0.0)
    """Applied to matrices only, never to norms, biases and other vectors."""
    beta1: float = setting(default=0.9, least=0.0, below=1.0)
    beta2: float = setting(default=0.999, least=0.0, below=1.0)
    eps: float = setting(default=1e-8, above=0.0)
    clip: float = setting(default=1.0, least=0.0)
    """Largest gradient norm; 0 turns clipping off."""

    def build(self, params: Mapping[str, nn.Parameter]) -> Optimizer:
        """The optimizer over named parameters."""
        import torch

        betas = (self.beta1, self.beta2)
        groups = _groups(params, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=True)


@config
class AdamW8bit:
    """AdamW whose moments are held in 8-bit blocks (arXiv:2110.02861), by bitsandbytes; small tensors stay 32-bit."""

    moment_bytes: ClassVar[float] = 2.1
    kind: Literal["adamw_8bit"] = "adamw_8bit"
    lr: float = setting(default=2e-4, above=0.0)
    weight_decay: float = setting(default=0.0, least=0.0)
    """Applied to matrices only, never to norms, biases and other vectors."""
    beta1: float = setting(default=0.9, least=0.0, below=1.0)
    beta2: float = setting(default=0.999, least=0.0, below=1.0)
    eps: float = setting(default=1e-8, above=0.0)
    clip: float = setting(default=1.0, least=0.0)
    """Largest gradient norm; 0 turns clipping off."""

    def build(self, params: Mapping[str, nn.Parameter]) -> Optimizer:
        """The optimizer over named parameters.

        Raises:
            ModelError: bitsandbytes is not installed.
        """
        try:
            from bitsandbytes.optim import AdamW8bit as Built
        except ImportError as missing:
            raise ModelError(
                f"adamw_8bit needs bitsandbytes ({missing})", fix="pip install bitsandbytes", key="optim.kind"
            ) from missing
        built: Optimizer = Built(
            _groups(params, self.weight_decay), lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps
        )
        return built


Optim = Annotated[
    AdamW | AdamW8bit,
    Later(("paged_adamw_8bit", "muon", "adafactor", "lion", "schedule_free", "galore", "apollo")),
]
