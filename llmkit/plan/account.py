"""What a training run needs in memory, by part: from the model's configuration and the headers of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORWARD_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of one forward that keep the device busy: more of them cost memory and gain little."""
HEADROOM = 0.85


@dataclass(frozen=True)
class Shape:
    """What the account needs to know of a model."""

    params: int
    layers: int
    hidden: int
    intermediate: int
    vocab: int
    linears: int
    """Sum of (in + out) over all linears but the head: a LoRA of rank r has r times as many parameters."""

    @staticmethod
    def read(config: Mapping[str, Any], tensors: Mapping[str, list[int]]) -> Shape:
        """From `config.json` and the shape of each weight."""
        text = config.get("text_config") or config
        params = 0
        linears = 0
        for name, shape in tensors.items():
            size = 1
            for length in shape:
                size *= length
            params += size
            if len(shape) == 2 and "embed" not in name and "lm_head" not in name:
                linears += sum(shape)
        hidden = int(text.get("hidden_size") or text.get("n_embd") or 0)
        return Shape(
            params,
            int(text.get("num_hidden_layers") or text.get("n_layer") or 0),
            hidden,
            int(text.get("intermediate_size") or 4 * hidden),
            int(text.get("vocab_size") or 0),
            linears,
        )


@dataclass(frozen=True)
class Account:
    """Bytes by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Held:
    """How a run holds things: bytes a weight, bytes an activation, the trained parameters and bytes of moments each."""

    weight_bytes: float
    activation_bytes: int
    trained: int
    moment_bytes: float
    recompute: bool
    logit_bytes: int


def account(shape: Shape, held: Held, tokens: int) -> Account:
    """The peak of one forward and backward over `tokens` tokens."""
    own = 10 * shape.hidden + 3 * shape.intermediate  # kept by a layer for its backward, per token
    layer = own * tokens * held.activation_bytes
    kept = shape.hidden * tokens * held.activation_bytes
    activations = shape.layers * kept + layer if held.recompute else shape.layers * layer
    return Account(
        weights=int(shape.params * held.weight_bytes),
        gradients=held.trained * 4,
        optimizer=int(held.trained * held.moment_bytes),
        activations=activations,
        logits=held.logit_bytes + 2 * tokens * shape.hidden * 4,
    )


@dataclass(frozen=True)
class Choice:
    """What `auto` came to."""

    rows: int
    recompute: bool
    account: Account
    fits: bool


def choose(
    shape: Shape, held: Held, max_length: int, available: int, device: str, rows: int | None, recompute: bool | None
) -> Choice:
    """Rows per forward and recompute, each as asked or, where `None`, the largest and cheapest that fit."""
    wanted = rows or max(1, FORWARD_TOKENS[device] // max_length)
    tries = [recompute] if recompute is not None else [False, True]
    for again in tries:
        for count in [wanted] if rows else range(wanted, 0, -1):
            choice = _choice(shape, held, max_length, available, count, again)
            if choice.fits:
                return choice
    return _choice(shape, held, max_length, available, rows or 1, tries[-1])


def _choice(shape: Shape, held: Held, max_length: int, available: int, rows: int, recompute: bool) -> Choice:
    from dataclasses import replace

    made = account(shape, replace(held, recompute=recompute), rows * max_length)
    return Choice(rows, recompute, made, made.total <= HEADROOM * available)
