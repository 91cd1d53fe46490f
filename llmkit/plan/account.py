"""What a training run needs in memory, by part: from the model's configuration and the headers of its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmkit.core.shape import Cost, Shape

FORWARD_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of one forward that keep the device busy: more of them cost memory and gain little."""
HEADROOM = 0.85
RECOMPUTE = {0: "none", 2: "selective", 1: "full"}
"""Every so many layers make their activations again; cheapest first."""
LINEARS = 7
"""Linears of a layer, of the common families."""


@dataclass(frozen=True)
class Account:
    """Bytes by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward keeps for the backward."""
    working: int
    """What comes and goes: the head's in the forward, or that of one layer's backward, whichever is more."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


@dataclass(frozen=True)
class Kept:
    """What a layer keeps of each token: so many times its hidden width, its inner width, its keys' width, in bytes."""

    hidden: int
    inner: int
    keys: int

    def bytes(self, shape: Shape) -> int:
        """Bytes of a token in a layer."""
        return self.hidden * shape.hidden + self.inner * shape.intermediate + self.keys * shape.keys


# counted by hooks on what autograd saves (tests/plan/test_account.py); 4 bytes a number, 2 in 16 bits
FUSED = Kept(4 * 4, 4 * 2, 4 * 2)
"""fp32 through our own linears, MLPs and norms: what is cheap to make again is not kept (core/remake.py)."""
QUANTISED = Kept(4 * 6, 4 * 4, 4 * 2)
"""peft's LoRA over a quantised base, in fp32."""
DROPPED = Kept(4 * 15, 4 * 4, 4 * 2)
"""peft's LoRA with dropout: each linear has an input of its own."""
DORA = Kept(4 * 15, 4 * 6, 4 * 6)
"""peft's DoRA: what the base gave and what it is scaled with too."""
HALF = Kept(2 * 12, 2 * 3, 2 * 2)
"""16 bits, by autocast or of the parameters, with norms in fp32."""
HALF_LORA = Kept(2 * 6 + 4 * 6, 2 * 2 + 4, 2 * 2)
"""Parameters of 16 bits under adapters of 32: each linear's input is kept in 32."""


@dataclass(frozen=True)
class Held:
    """How a run holds things."""

    weight_bytes: float
    """Of each weight of the layers."""
    plain_bytes: float
    """Of each weight of embeddings and head."""
    kept: Kept
    cost: Cost
    """Of what is trained."""
    moment_bytes: float
    """Of each trained parameter."""
    recompute: int
    """Every so many layers make their activations again; 0 for none."""
    head_bytes: int
    """What the head needs beside the hidden states."""
    gradients: int | None = None
    """Gradients that are there at once; all of them by default."""
    offload: bool = False
    """What the forward keeps waits on the host."""


def account(shape: Shape, held: Held, tokens: int) -> Account:
    """The peak of one forward and backward over `tokens` tokens."""
    cost = held.cost
    low = 4 * LINEARS * cost.low  # what an adapter's first half gave
    layer = (held.kept.bytes(shape) + low) * tokens
    hidden, inner = 4 * shape.hidden * tokens, 4 * shape.intermediate * tokens
    again = -(-shape.layers // held.recompute) if held.recompute else 0
    layers = again * hidden + (shape.layers - again) * layer + (layer if again else 0)
    layers = min(layers, layer + hidden) if held.offload else layers
    return Account(
        weights=int((shape.params - shape.embedded) * held.weight_bytes + shape.embedded * held.plain_bytes)
        + 4 * cost.more,
        gradients=4 * (cost.trained if held.gradients is None else held.gradients),
        optimizer=int(cost.trained * held.moment_bytes),
        activations=layers + 2 * hidden,  # and the head's input with its gradient
        working=max(held.head_bytes, 2 * hidden + 3 * inner),
    )


@dataclass(frozen=True)
class Choice:
    """What `auto` came to."""

    rows: int
    recompute: int
    """Every so many layers; 0 for none."""
    account: Account
    fits: bool


def choose(
    shape: Shape,
    held: Held,
    max_length: int,
    available: int,
    device: str,
    rows: int | None,
    recompute: int | None,
    most: int | None = None,
) -> Choice:
    """Rows per forward and recompute, each as asked or, where `None`, the largest and cheapest that fit; a step has
    `most` rows."""
    full = max(1, FORWARD_TOKENS[device] // max_length)
    wanted = rows or min(full, most or full)
    tries = [recompute] if recompute is not None else list(RECOMPUTE)
    for again in tries:
        for count in [wanted] if rows else range(wanted, 0, -1):
            choice = _choice(shape, held, max_length, available, count, again)
            if choice.fits:
                return choice
    return _choice(shape, held, max_length, available, rows or 1, tries[-1])


def _choice(shape: Shape, held: Held, max_length: int, available: int, rows: int, recompute: int) -> Choice:
    made = account(shape, replace(held, recompute=recompute), rows * max_length)
    return Choice(rows, recompute, made, made.total <= HEADROOM * available)
