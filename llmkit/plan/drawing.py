"""How long answers are drawn before a step, and how long they are read again: from stated formulas, as in `times.py`.

With P parameters in products, layers of width H, A answers of a rank, of which S at once, each of N tokens to a prompt
of M tokens:

    prompts     each is read once for its answers: 2 P + 2 L H M a token
    decoding    N A / S forwards of S tokens, each as long as the longest of three: the bytes of weights (a quantised
                base unpacked to 16 bits) and of the cache (half of an answer is there in the mean) at BANDWIDTH of the
                memory's rate; 2 P S operations at EFFICIENCY of the peak; and what the host takes to launch the
                kernels of each layer (LAUNCHED)
    scoring     2 P + 2 L H S a token forward, for each pass over prompts and answers; a reward model is asked by one
                rank for all, while the others wait

All prompts and answers are taken to be of full length. Judges, verifiers and tools take time that is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.core.shape import Shape
from llmkit.plan.account import Held
from llmkit.plan.beside import Round, token_bytes
from llmkit.plan.devices import Device
from llmkit.plan.times import BANDWIDTH, EFFICIENCY, looked_up, top

LAUNCHED = 1.7e-3
"""Seconds in which a host launches a layer of a forward that decodes: 1.5 and 2.0 of two models (benchmarks/LOG.md)."""


@dataclass(frozen=True)
class Decoding:
    """What a rank does before a step."""

    prompts: float
    """Seconds in which they are read."""
    step: float
    """Seconds of a forward that makes a token of each answer."""
    steps: float
    """How many of those there are."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.prompts + self.step * self.steps


def decoding(shape: Shape, held: Held, device: Device, draws: Round, world: int) -> Decoding:
    """Of the answers of one of `world` ranks."""
    answers, peak = draws.answers(world), EFFICIENCY * top(held, device)
    at_once, rate = min(draws.sequences, answers), BANDWIDTH * device.bandwidth
    used = shape.active - looked_up(shape)
    read = passed(shape, held, device, answers / draws.group * draws.prompt, draws.prompt)
    cached = (draws.prompt + draws.answer / 2) * token_bytes(shape, draws.cache, held.short)
    moved = (_weights(shape, held, draws.copied) + at_once * cached) / rate
    step = max(moved, 2 * used * at_once / peak, shape.layers * LAUNCHED)
    return Decoding(read, step, draws.answer * answers / at_once)


def passed(shape: Shape, held: Held, device: Device, tokens: float, length: int) -> float:
    """Seconds of a forward pass without a backward one over so many tokens, in sequences of `length`."""
    operations = 2 * (shape.active - looked_up(shape)) + 2 * shape.layers * shape.hidden * length
    moved = shape.layers * (64 * shape.hidden + 10 * shape.intermediate) * held.short / 2
    return tokens * (operations / (EFFICIENCY * top(held, device)) + moved / (BANDWIDTH * device.bandwidth))


def _weights(shape: Shape, held: Held, copied: bool) -> float:
    """Bytes that are moved for the weights of one forward; autocast keeps the copies of weights that are trained."""
    within, short = held.weight_bytes, held.short
    again = within < short or (copied and within > short)
    inside = (shape.active - shape.embedded) * (within + 2 * short if again else min(within, short))
    return inside + shape.vocab * shape.hidden * short
