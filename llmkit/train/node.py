"""The recipe's nodes for the loop: optimizer, schedule, precision, memory, evaluation, checkpoints, guard, logs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from llmkit.core.config import Duration, Later, config, setting
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


def _ramp(step: int, steps: int, warmup: float) -> tuple[float, float]:
    """The warm-up factor of a 1-based step, and the share (0 to 1) of the rest of the run that lies behind it."""
    first = round(warmup * steps) if warmup < 1 else int(warmup)
    if step <= first:
        return step / first, 0.0
    return 1.0, (step - 1 - first) / max(1, steps - first)


@config
class Constant:
    """The full rate after the warm-up."""

    kind: Literal["constant"] = "constant"
    warmup: float = setting(default=0.0, least=0.0)
    """Steps, or a share of the run when below 1."""

    def __call__(self, step: int, steps: int) -> float:
        """The factor on the rate at 1-based `step` of `steps`."""
        return _ramp(step, steps, self.warmup)[0]


@config
class Linear:
    """A straight line from the full rate to `floor` of it."""

    kind: Literal["linear"] = "linear"
    warmup: float = setting(default=0.0, least=0.0)
    """Steps, or a share of the run when below 1."""
    floor: float = setting(default=0.0, least=0.0, most=1.0)

    def __call__(self, step: int, steps: int) -> float:
        """The factor on the rate at 1-based `step` of `steps`."""
        ramp, done = _ramp(step, steps, self.warmup)
        return ramp * (1 - (1 - self.floor) * done)


@config
class Cosine:
    """Half a cosine from the full rate to `floor` of it (arXiv:1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    warmup: float = setting(default=0.03, least=0.0)
    """Steps, or a share of the run when below 1."""
    floor: float = setting(default=0.0, least=0.0, most=1.0)

    def __call__(self, step: int, steps: int) -> float:
        """The factor on the rate at 1-based `step` of `steps`."""
        ramp, done = _ramp(step, steps, self.warmup)
        return ramp * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)


@config
class Wsd:
    """Warm-up, stable, then a linear decay over the last `decay` of the run (arXiv:2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    warmup: float = setting(default=0.0, least=0.0)
    """Steps, or a share of the run when below 1."""
    decay: float = setting(default=0.2, least=0.0, most=1.0)
    floor: float = setting(default=0.0, least=0.0, most=1.0)

    def __call__(self, step: int, steps: int) -> float:
        """The factor on the rate at 1-based `step` of `steps`."""
        ramp, _ = _ramp(step, steps, self.warmup)
        falling = max(1, round(self.decay * steps))
        left = (steps - step + 1) / falling
        return ramp * (self.floor + (1 - self.floor) * min(1.0, left))


Schedule = Constant | Linear | Cosine | Wsd

Precision = Annotated[Literal["auto", "fp32", "bf16", "bf16_mixed"], Later(("fp16_mixed",))]


@config
class Batching:
    """What one optimizer step sees, over all ranks."""

    rows: int = setting(default=16, least=1)
    """Examples a step."""
    pairs: None = setting(default=None, later=True)
    prompts: None = setting(default=None, later=True)
    tokens: None = setting(default=None, later=True)


@config
class Memory:
    """What is given up to save memory."""

    recompute: Annotated[Literal["auto", "none", "full"], Later(("selective",))] = "auto"
    """Recompute each layer's activations in the backward pass; `auto` does so when the account does not fit without."""
    offload_activations: bool = setting(default=False, later=True)


@config
class Auto:
    """One process on one device."""

    kind: Literal["auto"] = "auto"


@config
class Single:
    """One process on one device."""

    kind: Literal["single"] = "single"


Strategy = Annotated[Auto | Single, Later(("ddp", "fsdp", "zero"))]


@config
class Parallel:
    """How the work is spread over ranks; more than one rank comes with the parallel strategies."""

    strategy: Strategy = Auto()
    replicate: int = setting(default=1, later=True)
    shard: int | Literal["auto"] = setting(default="auto", later=True)
    tensor: int = setting(default=1, later=True)
    context: int = setting(default=1, later=True)
    pipeline: int = setting(default=1, later=True)
    expert: int = setting(default=1, later=True)


@config
class Evaluating:
    """Evaluation on `data.valid` while training."""

    _short: ClassVar[str] = "every"
    every: int | None = setting(default=None, least=1)
    """Optimizer steps between evaluations; without it only before and after."""
    samples: int = setting(default=4, least=0)
    """Validation prompts that are answered at each evaluation and shown side by side in the report."""
    max_tokens: int = setting(default=64, least=1)
    """Tokens of each such answer."""
    rows: int | None = setting(default=None, least=1)
    """At most so many rows of `data.valid`, evenly apart."""


@config
class Checkpointing:
    """When the state is saved and what is kept."""

    every: int | Duration | None = setting(default=None, above=0)
    """Optimizer steps, or a duration (`10m`); without it only at the end and when asked to stop."""
    keep: int = setting(default=2, least=1)
    """Newest checkpoints that stay; the best one stays beside them."""
    best: Literal["valid.loss", "valid.perplexity", "valid.bits_per_byte"] | None = None
    """A metric, smaller is better: the run's result is then the best checkpoint, not the last."""


@config
class Guard:
    """What happens on a loss or a gradient that is not finite, or far above its median."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """`skip` leaves the weights and the optimizer untouched and goes on; three in a row stop the run. An evaluation
    whose loss is not finite meets the same policy: it stops the run, or counts for nothing."""
    spike: float = setting(default=10.0, least=0.0)
    """A loss above this many medians of the last 100 steps meets the same policy; 0 turns it off."""


@config
class TensorBoard:
    """Event files in `out/tensorboard` (needs `pip install tensorboard`)."""

    kind: Literal["tensorboard"] = "tensorboard"


Log = Annotated[TensorBoard, Later(("wandb", "mlflow", "trackio"))]
