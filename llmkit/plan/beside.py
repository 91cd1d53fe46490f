"""What a stage says that it holds beside the model in training, and what it draws: the planner adds it all up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmkit.adapters.node import Adapter
from llmkit.core.shape import Shape
from llmkit.inference.cache import Cache
from llmkit.models.node import ModelRef, Quant

CACHED = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.03}
"""Bytes of a number of a cache; int8 has a factor for each head of a token."""


@dataclass(frozen=True)
class Beside:
    """A model that is held beside the one in training, whole on each rank."""

    role: str
    """What it is there for: its name in the account."""
    model: ModelRef | None = None
    """Which; left out, the one in training."""
    key: str = "model"
    """What names it in the recipe."""
    quant: Quant | None = None
    """How it is held; left out, as the one in training, or as an adapter's base was."""
    how: Literal["trained", "frozen", "asked"] = "trained"
    """It is held as the model in training, as its frozen base would be, or as a model that is asked (`reading`)."""
    adapter: Adapter | None = None
    """What it has on it."""
    learns: bool = False
    """It is trained too, over the same tokens: with activations, gradients and moments of its own."""
    over: bool = False
    """Its weights but for what is trained are those of the model in training, which are held once."""
    cache: Cache | None = None
    """Where it writes: its keys and values take what this allows."""
    room: int | None = None
    """Tokens that it holds keys and values of at most, however much that allows."""
    passes: int = 0
    """Forward passes over what a step drew, without a backward one."""
    alone: bool = False
    """The main rank alone makes them, over what all ranks drew."""


@dataclass(frozen=True)
class Round:
    """Answers that are drawn from the weights in training before a step learns from them."""

    cache: Cache
    sequences: int
    """Answers that are made at once, at most."""
    tokens: int | None
    """Of one forward of the engine."""
    prompts: int
    """Of a step, over all ranks."""
    group: int
    """Answers to each."""
    prompt: int
    """Tokens at most."""
    answer: int
    """The same."""
    reuse: int = 1
    """Steps that learn from the same answers."""
    passes: int = 0
    """Forward passes of the model in training over them, without a backward one."""
    copied: bool = False
    """They are drawn from a copy of the weights."""
    aside: int = 0
    """Ranks that draw them and do not train; none where those who train draw."""

    @property
    def all(self) -> int:
        """Answers of a step."""
        return self.prompts * self.group

    def answers(self, world: int) -> int:
        """Those that one of the ranks that draw draws, at most, where `world` train."""
        return -(-self.prompts // (self.aside or world)) * self.group

    def room(self, world: int) -> int:
        """Tokens that the cache of one of those who draw need not hold more of."""
        block = self.cache.block
        most = min(self.sequences, self.answers(world))
        return most * (-(-(self.prompt + self.answer) // block) + 1) * block


def token_bytes(shape: Shape, cache: Cache, short: float) -> float:
    """Of a token's keys and values in all layers, which are computed in numbers of `short` bytes."""
    return 2 * shape.layers * shape.keys * CACHED.get(cache.precision, short)
