"""The words that travel between packages. Shapes: B rows of T tokens; S segments (sequences); N chosen positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from llmkit_kernels.paged.laid import Held, Laid
    from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of row `row`: they see themselves causally, and all of the segment `parent` and its own."""

    row: int
    start: int
    end: int
    parent: int = -1


@dataclass(frozen=True)
class Packed:
    """Many sequences in one row, each attending to itself alone; tokens outside every segment are padding."""

    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Tree:
    """Shared prefixes with branches: a segment's `parent` is the index of an earlier segment of the same row, or -1."""

    segments: tuple[Segment, ...]


class Exchange(Protocol):
    """The N ranks that hold parts of one row, seen from one of them. All of them make the same calls in one order."""

    @property
    def index(self) -> int:
        """Which of them this is."""
        ...

    @property
    def count(self) -> int:
        """N."""
        ...

    def swap(self, chunks: Tensor) -> Tensor:
        """(N, ...): chunk i goes to rank i. Gives, of that shape, what each has for this one, in the ranks' order."""
        ...

    def shift(self, tensors: Sequence[Tensor], by: int) -> Callable[[], list[Tensor]]:
        """Begins to send to the rank `by` places on, round the ring; the call that it gives waits for what comes from
        the rank as far before."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Tensors of one shape, of all of them in their order."""
        ...


Stretch = tuple[int, int]
"""Tokens [start, end) of a row."""


@dataclass(frozen=True, eq=False)
class Split:
    """One rank's part of a packed row that several hold: its own stretches lie end to end in (1, T / N).

    Equal only to itself: what follows from it is made once for all layers.
    """

    whole: Packed
    """Of all the row."""
    held: tuple[tuple[Stretch, ...], ...]
    """What each rank holds, in order, equally long together; all of it together is the row."""
    method: Literal["ulysses", "ring"]
    exchange: Exchange

    @property
    def mine(self) -> tuple[Stretch, ...]:
        """What this rank holds."""
        return self.held[self.exchange.index]

    @property
    def tokens(self) -> int:
        """T, with what fills the row up."""
        return max(end for part in self.held for _, end in part)

    def cut(self, row: Tensor) -> Tensor:
        """This rank's part of (1, T, ...)."""
        import torch

        return torch.cat([row[:, start:end] for start, end in self.mine], 1)


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of row `row` after `past` cached ones; `blocks` names the blocks of them all in order.

    Spans lie in row 0, in the order of their tokens. A tree of drafts (`parents`, at most 64 tokens): each token sees
    the past, its ancestors and itself; its key lies at its place in the span, whatever its position is.
    """

    row: int
    start: int
    end: int
    past: int
    blocks: tuple[int, ...]
    parents: tuple[int, ...] = ()
    """Of each token the earlier one of the span that it follows, -1 for the past; none: each follows the one before."""


class KeyValueStore(Protocol):
    """Where `Paged` keeps keys and values."""

    def lay(self, spans: Sequence[Span]) -> Laid:
        """What follows from the spans of a step, for all layers."""
        ...

    def held(self, layer: int, keys: Tensor, values: Tensor) -> Held:
        """The blocks of a layer, for such keys (KV, T, D) and values (KV, T, Dv)."""
        ...

    def there(self, layer: int) -> Held | None:
        """Those of a layer, if it has any yet."""
        ...

    def write(self, layer: int, keys: Tensor, values: Tensor, laid: Laid) -> None:
        """Stores the new keys and values of a step."""
        ...

    def read(self, layer: int, laid: Laid, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the sequence of a span, (KV, past + L, D) each, in the type of `like`."""
        ...

    def read_single(self, layer: int, laid: Laid, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a step of single tokens those of all sequences, (S, KV, M, D) each, and which are theirs, (S, M)."""
        ...

    def read_flat(self, layer: int, laid: Laid, like: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the sequences of all spans end to end, (K, KV, D) each."""
        ...


@runtime_checkable
class Steady(Protocol):
    """A rotary module whose frequencies follow the length of a sequence."""

    def steady(self, start: int, end: int) -> bool:
        """Whether a sequence turns alike at every length from `start` to `end`: then its keys may be kept."""
        ...


@dataclass(frozen=True, eq=False)
class Paged:
    """Sequences whose earlier keys and values lie in blocks: each span's tokens see those and themselves causally.

    Equal only to itself: what follows from it is made once for all layers.
    """

    store: KeyValueStore
    spans: tuple[Span, ...]

    @cached_property
    def laid(self) -> Laid:
        """The spans as the store lays them out."""
        return self.store.lay(self.spans)


@dataclass(frozen=True)
class Branches:
    """The K completions of a batch, those of one prompt next to each other; N positions have a weight."""

    of: Tensor
    """(N,): the completion of each position that has a weight, row by row."""
    group: Tensor
    """(K,): the prompt of each completion, from 0, rising."""
    per: Mapping[str, Tensor] = field(default_factory=dict)
    """(K,) each: figures of completions."""
    each: Mapping[str, Tensor] = field(default_factory=dict)
    """(N,) each: figures of their tokens."""


@dataclass(frozen=True)
class Batch:
    """One forward. Tensors are (B, T); `labels` are shifted already: position t predicts `labels[:, t]`."""

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    weights: Tensor
    attend: Packed | Tree | Split | None
    """None where the model cannot take a context: then rows are padded on the right and `lengths` tells how far."""
    ids: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    branches: Branches | None = None
    """Where rows are completions of prompts: which is whose."""


@dataclass(frozen=True)
class Needs:
    """What a loss over tokens reads of the head."""

    spread: bool = False
    """`Scores`, not log-probabilities alone."""
    by_weight: bool = True
    """Whether each log-probability is only multiplied with its weight in the batch, up to one common factor."""
    entropy: Literal["", "figure", "trained"] = ""
    """`Entropic`, not log-probabilities alone: with gradients of the entropies (`trained`) or without."""
    temperature: float = 1.0
    """What logits are divided by: the law that tokens were drawn from."""
    values: bool = False
    """`Valued`: what the loss reads of the policy, with what a critic says."""


class Scores(NamedTuple):
    """What the head knows of N chosen positions, each (N,) in fp32."""

    logps: Tensor
    """Log-probability of the label."""
    lse: Tensor
    """The log of the sum of exp(logit) over the vocabulary."""
    mean: Tensor
    """Log-probability averaged over the tokenizer's words, without the rows that pad the vocabulary."""


class Entropic(NamedTuple):
    """What the head knows of the laws at N chosen positions, each (N,) in fp32."""

    logps: Tensor
    """Log-probability of the label."""
    entropy: Tensor
    """Of the whole law, in nats."""


class Referenced(NamedTuple):
    """What a policy and its reference say of the same N positions."""

    policy: Tensor | Scores | Entropic
    """As the head gives it."""
    reference: Tensor
    """(N,): log-probabilities, without gradient."""


class Valued(NamedTuple):
    """What a policy and its critic say of the same N positions."""

    policy: Tensor | Entropic
    """As the head gives it."""
    values: Tensor
    """(N,), in fp32 at least: what is still to come, before the token of the position is drawn."""


class Drafted(NamedTuple):
    """What K drafts in turn, after each of N rows, are like; step k drafts the token k + 2 places behind its row."""

    losses: tuple[Tensor, ...]
    """Of each step the weighted sum over its rows."""
    counts: tuple[Tensor, ...]
    """Of each step the sum of their weights."""
    kept: tuple[Tensor, ...]
    """Of each step the weighted sum of how often a draft drawn by the head's law is kept: sum min(p, q)."""
    rows: Tensor
    """(N,): the places of the rows in their batch."""
    right: Tensor
    """(N, K): whether the likeliest draft is the token of the text, and all drafts before it were."""


class Compared(NamedTuple):
    """How a student is beside its teacher: weighted sums over the positions that have a weight."""

    loss: Tensor
    """What is made small."""
    nll: Tensor
    """Negative log-likelihood of the labels; it has no gradient."""


@dataclass(frozen=True)
class LossSum:
    """A sum and its count, never a mean: `fit` divides by the global count. Each extra is its own (sum, count)."""

    total: Tensor
    count: Tensor
    extras: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """One figure with its interval: `low` and `high` bound the `level` confidence interval of `value`.

    They are None where there is none: a single example, or cluster of examples, says nothing of how the figure varies.
    """

    metric: str
    slice: str
    value: float
    n: int
    low: float | None
    high: float | None
    level: float = 0.95


def named(metric: str, slice: str) -> str:
    """A figure's name, with its slice where it is of a part alone."""
    return metric if slice == "all" else f"{metric}, {slice}"


def interval(low: float | None, high: float | None, form: str = ".4g") -> str:
    """An interval as it is shown."""
    return "no interval: one cluster" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"
