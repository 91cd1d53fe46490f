"""What a training run needs in memory, by part: from the model's configuration and the headers of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llmkit.core.shape import Cost, Shape
from llmkit.plan.shares import ALONE, Shares

LINEARS = 7
"""Linears of a layer, of the common families."""


@dataclass(frozen=True)
class Account:
    """Bytes of one rank, by part."""

    base: int
    """What libraries take for themselves."""
    weights: int
    gradients: int
    """All that a rank holds of them, at the end of the backward pass."""
    optimizer: int
    activations: int
    """What the forward keeps for the backward."""
    logits: int
    """What the head has beside them, at the end of the forward."""
    working: int
    """What one layer's backward takes, with what it makes again."""
    communication: int
    """What is gathered of other ranks, and what is on its way to them."""
    early: int = 0
    """Gradients that are there in the forward already: of the micro-batches before, or as buckets that stay."""
    exported: int = 0
    """Copies that the writing of the result makes."""
    loaded: int = 0
    """Weights at most while they are read: all of them, or a rank's part with a layer, embeddings and head whole."""
    mapped: int = 0
    """Pages of files that are resident while weights are read from them: the system takes them back where it must."""
    updating: int = 0
    """What the update of the largest matrix takes."""
    saved: int = 0
    """The copy that a checkpoint is written of, beside the loop."""
    stays: bool = False
    """The room of that copy is there while steps run: a checkpoint is made in the midst of them."""
    beside: Mapping[str, int] = field(default_factory=dict)
    """Models and caches that are there all the time too, by what they are for."""
    drawing: int = 0
    """What one forward of the engine takes, where answers are drawn between steps."""

    def beside_of(self, role: str, other: Account) -> Account:
        """This one with that of a model that is trained over the same tokens; their backward passes run one after the
        other."""
        there = other.weights + other.gradients + other.optimizer + other.communication
        return replace(
            self,
            activations=self.activations + other.activations,
            working=max(self.working, other.working),
            loaded=self.loaded + other.loaded,
            saved=self.saved + other.saved,
            beside={**self.beside, role: there},
        )

    @property
    def load(self) -> int:
        """The peak of loading: of the model, or of what is read after it."""
        after = self.weights + sum(self.beside.values()) if self.beside else 0
        return self.base + max(self.loaded, after) + self.mapped

    @property
    def held(self) -> int:
        """What is there all the time."""
        return self.base + self.weights + self.optimizer + self.communication + sum(self.beside.values())

    @property
    def total(self) -> int:
        """The peak of a step: when the forward ends, when the backward does, or in the update."""
        forward = self.early + self.activations + max(self.logits, self.working)
        return self.held + max(forward, self.gradients + max(self.working, self.updating)) + self.room

    @property
    def rollout(self) -> int:
        """The peak while answers are drawn; 0 where none are."""
        return self.held + self.drawing + self.room if self.drawing else 0

    @property
    def room(self) -> int:
        """What checkpoints hold while steps run."""
        return self.saved if self.stays else 0

    @property
    def save(self) -> int:
        """The peak of a checkpoint, and of the writing of the result, whose tensors are written in pieces."""
        return self.held - self.communication + max(self.exported, self.saved)

    @property
    def resume(self) -> int:
        """The peak of going on from a checkpoint, which is read whole beside what it is put into."""
        return self.held - self.communication + self.optimizer + self.exported

    @property
    def peak(self) -> int:
        """The largest of a run that is not resumed."""
        return max(self.total, self.rollout, self.save, self.load - self.mapped)

    @property
    def parts(self) -> dict[str, int]:
        """The parts of the step's peak: they add up to `total`."""
        there = self.early + self.activations + max(self.logits, self.working)
        ends = there < self.gradients + max(self.working, self.updating)
        head = not ends and self.logits >= self.working
        return {
            "base": self.base,
            "weights": self.weights,
            "gradients": self.gradients if ends else self.early,
            "optimizer": self.optimizer,
            "activations": 0 if ends else self.activations,
            "logits": self.logits if head else 0,
            "working": 0 if head else max(self.working, self.updating) if ends else self.working,
            "communication": self.communication,
            "checkpoint": self.room,
            **self.beside,
        }


@dataclass(frozen=True)
class Kept:
    """What a layer keeps of each token: so many times its hidden width, its inner width, its keys' width, in bytes."""

    hidden: int
    inner: int
    keys: int

    def bytes(self, shape: Shape, cut: Shares = ALONE) -> float:
        """Bytes of a token in a layer; norms of queries and keys (`q_norm`) keep both once more."""
        normed = 4 if any("q_norm" in name for name in shape.tensors) else 0
        hidden, inner = (
            (self.hidden + normed) * shape.hidden / cut.between,
            self.inner * shape.intermediate / cut.tensor,
        )
        return hidden + inner + (self.keys + normed) * shape.keys / cut.tensor


# counted by hooks on what autograd saves (tests/plan/test_account.py); 4 bytes a number, 2 in 16 bits
FUSED = Kept(4 * 4, 4 * 2, 4 * 2)
"""fp32 through our own linears, MLPs and norms: what is cheap to make again is not kept (core/remake.py)."""
QUANTISED = Kept(4 * 6, 4 * 4, 4 * 2)
"""peft's LoRA over a quantised base, in fp32."""
DROPPED = Kept(4 * 15, 4 * 4, 4 * 2)
"""peft's LoRA with dropout: each linear has an input of its own."""
DORA = Kept(4 * 14, 4 * 7, 4 * 8)
"""peft's DoRA: what the base gave and what it is scaled with too."""
HALF = Kept(2 * 14, 2 * 2, 2 * 4)
"""Parameters of 16 bits, with norms in fp32."""
MIXED = Kept(2 * 14, 2 * 3, 2 * 4)
"""16 bits by autocast, with norms in fp32."""
CUDA_HALF = Kept(2 * 9, 2 * 2, 2 * 4)
"""On a CUDA device, where a norm is one kernel that keeps its input, and a packed row is attended to as it lies."""
CUDA_MIXED = Kept(2 * 12, 2 * 3, 2 * 4)
"""The same by autocast."""
CUDA_MIXED_LORA = Kept(2 * 7, 2 * 2, 2 * 4)
"""Our LoRA over weights of 16 bits there: linears of one input keep it once, and a gated product is made again."""
HALF_LORA = Kept(2 * 8 + 4 * 6, 2 * 2 + 4, 2 * 4)
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
    """What the head needs beside the hidden states, at most: blocks of logits."""
    head_gradient: int = 0
    """Of the head's weight, where it is trained: it is made in the forward, and scaled into another in the backward."""
    gradients: int | None = None
    """Gradients that are there at once; all of them by default."""
    offload: bool = False
    """What the forward keeps waits on the host."""
    short: float = 4.0
    """Bytes of a weight that is gathered, and of a number that ranks exchange in a layer."""
    copies: float = 0.0
    """Bytes that autocast's copy of each weight in a product takes until the backward pass."""
    trained_bytes: float = 4.0
    """Of each weight that is trained, and of its gradient."""
    base: int = 0
    turns: int = 1
    """Micro-batches of a step, on a rank."""
    by_layer: bool = True
    """Of a model that is cut, a layer is cut before the next one is read; else each rank reads all of it first."""
    updating: int = 0
    """Bytes that the update of the largest matrix takes."""
    copied: bool = False
    """Checkpoints are written of a copy in the memory that is counted."""
    saves: bool = False
    """And some in the midst of the run."""
    exports: bool = False
    """The result is written from the memory that is counted: the host is the device."""
    beside: Mapping[str, int] = field(default_factory=dict)
    """Bytes of models and caches beside the model in training, by what they are for."""
    drawing: int = 0
    """Bytes that a forward of the engine takes, where answers are drawn."""
    trunks: tuple[Trunk, ...] = ()
    """Models that are trained beside it."""


@dataclass(frozen=True)
class Trunk:
    """A model that is trained beside another one, over the same tokens."""

    role: str
    """What it is there for."""
    shape: Shape
    """Of its layers and embeddings: a head of the vocabulary is not read."""
    held: Held
    over: bool = False
    """Its frozen weights are those of the other one."""

    def beside(self, first: Held) -> Held:
        """How it is held in the steps of the other one."""
        return replace(self.held, recompute=first.recompute, turns=first.turns, offload=first.offload)


def inside(shape: Shape, cut: Shares) -> float:
    """Parameters of layers in a rank's part of the model, before a strategy cuts them once more."""
    elsewhere = shape.experts * (1 - 1 / cut.expert) if cut.expert > 1 else 0
    return (shape.params - shape.embedded - elsewhere) / cut.tensor * cut.stage(shape)


def outside(shape: Shape, cut: Shares) -> int:
    """Parameters of embeddings and head on a rank; of several stages the first has the ones, the last the other."""
    return shape.embedded if cut.pipeline == 1 else min(shape.embedded, shape.vocab * shape.hidden)


def trained(shape: Shape, cost: Cost, cut: Shares) -> float:
    """Those of them that are trained, and all others that are. Of a model that is not trained whole, what belongs to
    experts is counted as if it lay on every rank: at most it is so much."""
    whole = cost.trained >= shape.params
    if cut.pipeline > 1 and whole:
        return inside(shape, cut) + outside(shape, cut)
    elsewhere = shape.experts * (1 - 1 / cut.expert) if cut.expert > 1 and whole else 0
    return (cost.trained - elsewhere) / cut.tensor * cut.stage(shape)


def account(shape: Shape, held: Held, tokens: int, shares: Shares = ALONE) -> Account:
    """The peak of one forward and backward over `tokens` tokens, on one rank."""
    made = _alone(shape, held, tokens, shares)
    for trunk in held.trunks:
        own = trunk.beside(held)
        if trunk.over:
            own = replace(own, weight_bytes=0.0, plain_bytes=0.0, copies=0.0)
        made = made.beside_of(trunk.role, _alone(trunk.shape, own, tokens, shares))
    return made


def _alone(shape: Shape, held: Held, tokens: int, shares: Shares) -> Account:
    cost, cut = held.cost, shares
    here, learned = inside(shape, cut), trained(shape, cost, cut)
    at_once = learned if held.gradients is None else min(learned, held.gradients)
    gradients = held.trained_bytes * at_once / (1 if cut.whole_gradients else cut.gradients)
    copies = 0.0 if cut.gathered else held.copies * (here + shape.embedded / 2)  # of the head, not of embeddings
    weights = (here * held.weight_bytes + outside(shape, cut) * held.plain_bytes + 4 * cost.more) / cut.weights
    optimizer = learned * (held.moment_bytes + cut.master) / cut.optimizer
    kept, again, working = _activations(shape, held, tokens / cut.context, cut)
    blocks = min(held.head_bytes, int(8 * shape.vocab * tokens / cut.context))
    return Account(
        base=held.base,
        weights=int(copies) + (0 if "weights" in cut.away else int(weights)),
        gradients=0 if "gradients" in cut.away else int(gradients),
        optimizer=0 if "optimizer" in cut.away else int(optimizer),
        activations=int(kept),
        logits=max(2 * held.head_gradient, held.head_gradient + blocks),
        working=int(again + working),
        communication=int(_communication(shape, held, tokens / cut.context, cut)),
        loaded=int(_loaded(shape, held, cut)),
        mapped=int(shape.params * held.plain_bytes) if held.exports else 0,
        updating=held.updating,
        saved=_saved(held, cut, learned, optimizer),
        stays=held.saves,
        beside=held.beside,
        drawing=held.drawing,
        early=int(gradients) if (held.turns > 1 or cut.bucket) and "gradients" not in cut.away else 0,
        exported=int(
            held.exports * (4 * cost.trained if cost.trained < shape.params else shape.params * held.plain_bytes)
        ),
    )


def _saved(held: Held, cut: Shares, learned: float, optimizer: float) -> int:
    """Bytes that a checkpoint copies on the host: what is trained and its state; replicas share the writing."""
    return int((learned * held.trained_bytes / cut.weights + optimizer) / cut.copies) if held.copied else 0


def _loaded(shape: Shape, held: Held, cut: Shares) -> float:
    """Bytes of weights at most while they are read: of a model that is cut, a layer or embeddings and head are whole
    beside what is cut already (models/unread.py)."""
    inside, outside = (shape.params - shape.embedded) * held.weight_bytes, shape.embedded * held.plain_bytes
    if not held.by_layer or cut.weights * cut.tensor == 1:
        return inside + outside
    part = inside / cut.tensor
    here = 0.0 if "weights" in cut.away else 1 / cut.weights
    return part * here + outside + max(part / max(1, shape.layers), outside * here if cut.weights > 1 else 0.0)


def _activations(shape: Shape, held: Held, tokens: float, cut: Shares) -> tuple[float, float, float]:
    """Bytes that all layers keep; that one makes again; and that its backward takes beside."""
    layers = (shape.layers if held.cost.layers is None else held.cost.layers) * cut.stage(shape)
    low = 4 * LINEARS * held.cost.low  # what an adapter's first half gave
    layer = (held.kept.bytes(shape, cut) + low) * tokens
    hidden, inner = 4 * shape.hidden * tokens / cut.between, 4 * shape.intermediate * tokens / cut.tensor
    stored = hidden * (1 if held.short == 4 else 0.5)  # the input of a layer that makes its activations again
    recomputed = -(-layers // held.recompute) if held.recompute else 0
    kept = recomputed * stored + (layers - recomputed) * layer
    kept = min(kept, layer + hidden) if held.offload else kept
    kept *= min(cut.pipeline, held.turns)  # the first stage is as many micro-batches ahead of the last
    kept += 4 * held.cost.beside * tokens
    return kept + 2 * hidden, layer if recomputed else 0.0, 2 * hidden + 3 * inner  # 2: the head's input, its gradient


def _communication(shape: Shape, held: Held, tokens: float, cut: Shares) -> float:
    """Layers, embeddings and head that are gathered, their whole gradients, buckets, tokens on the way to experts."""
    deep = inside(shape, cut) / cut.stage(shape) / max(1, shape.layers)
    trains = held.cost.trained >= shape.params
    whole = min(cut.gathered, shape.layers)
    if cut.live:
        whole = min(shape.layers, int(cut.live / deep))
    some = min(2, whole) * held.cost.trained / max(1, shape.layers)
    grads = 4 * (min(2, whole) * deep + shape.embedded if trains else some)
    within, outside = min(held.weight_bytes, held.short), min(held.plain_bytes, held.short)
    gathered = whole * deep * within + shape.embedded * outside + grads if whole else 0.0
    ring = 2 * 2 * shape.keys * held.short * tokens if cut.context > 1 else 0.0  # keys and values, one pair on its way
    ring += 2 * shape.chosen * shape.hidden * 4 * tokens if cut.expert > 1 else 0.0  # given and taken
    way = min(cut.elements, held.cost.trained) * held.trained_bytes
    buckets = min(cut.bucket, 4.0 * held.cost.trained)
    if cut.bucket and held.turns > 1:  # torch's buckets are there beside the gradients of the micro-batches before
        buckets = 4.0 * held.cost.trained
    return gathered + ring + way + buckets
