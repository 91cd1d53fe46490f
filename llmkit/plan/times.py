"""How long a step takes, and what is sent in it: from stated formulas and a device's data sheet.

With P parameters in products (embeddings apart, the head counted), L layers of width H, rows of S tokens:

    products    2 P forward; backward 2 P for the inputs, and 2 P' for the P' that are trained; recomputed 2 P again
    attention   2 L H S forward (causal: half of a full square), backward 2.5 times that
    elementwise (64 H + 10 I) bytes a token and layer forward, twice that backward: norms, rotations, gates, residuals
    sent        ddp: gradients all-reduced, 2 (n - 1) / n of them a step
                fsdp, zero 3: weights gathered twice and gradients scattered once a micro-batch, (n - 1) / n each
                tensor: 4 all-reduces of the hidden states a layer; context: keys and values around the ring, twice
                expert: 4 exchanges of the hidden states a layer of experts, for each expert that a token goes through,
                (n - 1) / n each, and 2 more where it is recomputed; gradients of all but experts all-reduced
                pipeline: hidden states ahead and their gradients back, once a micro-batch each
    pipeline    of p stages over m micro-batches, each is idle for (p - 1) / (m + p - 1) of a step
    step        products and attention at EFFICIENCY of the peak, elementwise at BANDWIDTH of the memory's; of what is
                sent, what exceeds OVERLAP of that time waits; then the optimizer, which reads and writes what it holds

A model that is trained beside it over the same tokens, as a critic, takes the same terms of its own, without a head.
MFU counts 6 P + 12 L H S a token, whatever is frozen or made again (arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmkit.core.shape import Shape
from llmkit.parallel.degrees import Degrees
from llmkit.plan.account import Held, inside, trained
from llmkit.plan.devices import Device
from llmkit.plan.shares import Shares

EFFICIENCY = 0.60
"""Share of the peak that products reach; fixed on three published runs (benchmarks/plan_published.py)."""
BANDWIDTH = 0.80
"""Share of the memory's rate that elementwise work reaches."""
WIRE = 0.75
"""Share of a link's rate that a collective reaches."""
OVERLAP = 0.9
"""Share of the time of products behind which sending hides."""


@dataclass(frozen=True)
class Times:
    """Of one optimizer step."""

    compute: float
    """Seconds of products, attention and elementwise work, with those in which a stage is idle."""
    waiting: float
    """Seconds for what is sent and not hidden."""
    update: float
    """Seconds of the optimizer."""
    sent: float
    """Bytes that a rank sends."""
    tokens: float
    """Of all ranks."""
    mfu: float
    rollout: float = 0.0
    """Seconds in which answers are drawn, before the step."""
    scoring: float = 0.0
    """Seconds of forward passes over them, without a backward one."""
    answers: int = 0
    """Of all ranks."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.waiting + self.update + self.rollout + self.scoring

    def after(self, rollout: float, scoring: float, answers: int) -> Times:
        """The step with what comes before it."""
        return self._longer(replace(self, rollout=rollout, scoring=scoring, answers=answers))

    def beside(self, other: Times) -> Times:
        """The step with what another model takes that is trained over the same tokens; MFU stays that of the first."""
        compute, waiting = self.compute + other.compute, self.waiting + other.waiting
        update, sent = self.update + other.update, self.sent + other.sent
        return self._longer(replace(self, compute=compute, waiting=waiting, update=update, sent=sent))

    def _longer(self, made: Times) -> Times:
        return replace(made, mfu=self.mfu * self.seconds / made.seconds)

    @property
    def share(self) -> float:
        """Of it, in which answers are drawn."""
        return self.rollout / self.seconds

    @property
    def rate(self) -> float:
        """Tokens a second of all ranks."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Work:
    """What a rank does in a step."""

    tokens: int
    """Of a micro-batch, before any cut of rows."""
    length: int
    """Of a sequence."""
    turns: int
    """Micro-batches."""
    forwards: int = 0
    """Forward passes of the whole model beside the one that has a backward pass."""


def times(shape: Shape, held: Held, cut: Shares, degrees: Degrees, device: Device, work: Work) -> Times:
    """What a step takes on a device of a known data sheet."""
    local = work.tokens * work.turns / cut.context  # tokens that a rank computes, in its part of the model
    part = cut.tensor / cut.slowest(shape)
    peak = EFFICIENCY * top(held, device)
    products, attention = _operations(shape, held, work.length)
    products += work.forwards * 2 * (shape.active - looked_up(shape))
    attention += work.forwards * 2 * shape.layers * shape.hidden * work.length
    elementwise = _elementwise(shape, held, work.forwards) / (BANDWIDTH * device.bandwidth)
    compute = local / part * ((products + attention) / peak + elementwise)
    compute += work.turns * _unpacked(shape, held, cut) / (BANDWIDTH * device.bandwidth)
    compute *= 1 + (cut.pipeline - 1) / work.turns
    data, inner = _sent(shape, held, cut, degrees, work)
    between = min(device.link, device.network * device.here)  # a ring leaves a host by the networks of all its devices
    outer = between if degrees.world > device.here else device.link
    near = device.link if cut.tensor * cut.pipeline * cut.context * cut.expert <= device.here else between
    seconds = data / (WIRE * outer) + inner / (WIRE * near)
    waiting = max(0.0, seconds - OVERLAP * compute)
    state = trained(shape, held.cost, cut) * (8 + 2 * held.moment_bytes) / cut.optimizer
    update = state / (BANDWIDTH * (device.bandwidth if "optimizer" not in cut.away else HOST))
    whole = degrees.data * work.tokens * work.turns
    model = 6 * (shape.active - looked_up(shape)) + 12 * shape.layers * shape.hidden * work.length
    seconds = compute + waiting + update
    mfu = model * whole / seconds / (top(held, device) * degrees.world)
    return Times(compute, waiting, update, data + inner, whole, mfu)


def top(held: Held, device: Device) -> float:
    """Operations a second at most."""
    return device.half if held.short == 2 else device.single


HOST = 50e9
"""Bytes a second at which a host's processor updates what was offloaded to it; its rank's share."""


def looked_up(shape: Shape) -> int:
    """Parameters of the embeddings, which are looked up and in no product; a tied head multiplies with them."""
    head = shape.vocab * shape.hidden
    return max(0, shape.embedded - head)


def _operations(shape: Shape, held: Held, length: int) -> tuple[float, float]:
    """Operations a token in products and in attention."""
    used = shape.active - looked_up(shape)
    trained = min(1.0, held.cost.trained / shape.params)
    again = 1 / held.recompute if held.recompute else 0.0
    attention = 2 * shape.layers * shape.hidden * length
    return 2 * used * (2 + trained + again) + 4 * held.cost.trained * (trained < 1), attention * (3.5 + again)


def _elementwise(shape: Shape, held: Held, forwards: int = 0) -> float:
    """Bytes a token that are read and written beside products; `forwards` passes have no backward one."""
    again = 1 / held.recompute if held.recompute else 0.0
    size = held.short / 2
    return (
        shape.layers * (64 * shape.hidden + 10 * shape.intermediate) * (3 + again + forwards) * size
        + (30 + 10 * forwards) * shape.vocab
    )


def _unpacked(shape: Shape, held: Held, cut: Shares) -> float:
    """Bytes of a micro-batch that a quantised base, or autocast's copies, take to be read and written in 16 bits."""
    return inside(shape, cut) * (held.weight_bytes + 2 * held.short) * 2 if held.weight_bytes < 2 else 0.0


def _sent(shape: Shape, held: Held, cut: Shares, degrees: Degrees, work: Work) -> tuple[float, float]:
    """Bytes a rank sends in a step to ranks that see other rows, and to those that it holds layers or rows with."""
    part, learned = cut.tensor * cut.pipeline, trained(shape, held.cost, cut)
    e, n = cut.expert, cut.optimizer
    copies = degrees.data * degrees.context // e
    if cut.gathered:
        weights = inside(shape, cut) * min(held.weight_bytes, held.short) + shape.embedded * held.short / part
        data = work.turns * (n - 1) / n * (2 * weights + 4 * learned)
        data += 2 * (degrees.replicate - 1) / degrees.replicate * 4 * learned / n
    else:
        data = 2 * (copies - 1) / copies * 4 * learned
    own = shape.experts / e if held.cost.trained >= shape.params else 0  # their gradients are whole on their rank
    data += 2 * (e - 1) / e * 4 * (learned - own) / (n if cut.gathered else 1)
    tokens = work.tokens * work.turns / cut.context
    t, c = cut.tensor, cut.context
    hidden = shape.layers / cut.pipeline * tokens * shape.hidden * held.short
    inner = 4 * 2 * (t - 1) / t * hidden
    inner += 2 * (c - 1) * shape.layers / cut.pipeline * tokens * 2 * shape.keys / t * held.short
    ways = 4 + 2 * (held.recompute == 1)
    inner += ways * (e - 1) / e * shape.mixed / cut.pipeline * tokens * shape.chosen * shape.hidden * held.short
    inner += 2 * (cut.pipeline > 1) * tokens * shape.hidden * held.short
    return data, inner
