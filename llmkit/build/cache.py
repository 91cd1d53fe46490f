"""The engine's cache for a model that is loaded, and for what drafts for it: what one block takes is measured, and not
worked out from its family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from llmkit.core.errors import ResourceError
from llmkit.core.memory import available
from llmkit.core.types import Paged, Span
from llmkit.inference.cache import Cache
from llmkit.inference.runner import Forward
from llmkit.models.paged import BlockStore

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def store_of(
    forward: Forward,
    cache: Cache,
    notice: Callable[[str], None] = lambda _: None,
    most: int | None = None,
    ranks: int = 1,
    least: Callable[[int], int] = int,
) -> BlockStore:
    """Blocks for a model, as many as the budget holds. No more than for `most` tokens; `least`: the number that fits
    here -> the least that fits on any of the `ranks` that hold the model together.

    Raises:
        ResourceError: there is no room for a single block.
    """
    store = measured(forward, cache)
    count = least(fit([store], cache, ranks))
    store.resize(count if most is None else min(count, -(-most // cache.block)))
    notice(told(store))
    return store


class Caches:
    """The cache of a model and that of what drafts for it, if that has one: of one budget, and of as many blocks."""

    def __init__(
        self,
        store: BlockStore,
        cache: Cache,
        notice: Callable[[str], None] = lambda _: None,
        most: int | None = None,
        resize: Callable[[int], None] | None = None,
    ) -> None:
        """`store`: the model's, measured or of its size already; `most`: tokens that need not be held more of;
        `resize`: of the model's, on all ranks that hold it."""
        self.store, self.cache, self.notice, self.most = store, cache, notice, most
        self.resize, self.sized = resize or store.resize, store.blocks > 1

    def clear(self) -> None:
        """What drafts is loaded before the caches take their share."""
        if self.store.blocks > 1:
            self.resize(1)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def beside(self, forward: Forward) -> BlockStore:
        """A cache for what drafts, and the model's beside it.

        Raises:
            ResourceError: there is no room for a block of both.
        """
        own = measured(forward, self.cache)
        own.resize(self._resized([self.store, own]))
        self.notice(f"drafter's {told(own)}")
        return own

    def settle(self) -> None:
        """The model's is of its size, if nothing has one beside it.

        Raises:
            ResourceError: there is no room for a single block.
        """
        if not self.sized:
            self._resized([self.store])

    def _resized(self, stores: Sequence[BlockStore]) -> int:
        count, self.sized = fit(stores, self.cache), True
        count = count if self.most is None else min(count, -(-self.most // self.cache.block))
        self.resize(count)
        self.notice(told(self.store))
        return count


def measured(forward: Forward, cache: Cache) -> BlockStore:
    """A cache of one block: one token is run to see what a model's layers keep."""
    store = BlockStore(1, cache.block, DTYPES[cache.precision])
    one = torch.zeros(1, dtype=torch.int64, device=forward.device)
    with torch.no_grad():
        forward.hidden(one, one, Paged(store, (Span(0, 0, 1, 0, (0,)),)), [""])
    return store


def fit(stores: Sequence[BlockStore], cache: Cache, ranks: int = 1) -> int:
    """Blocks that each of them can have, of the budget of each device on which they lie.

    Raises:
        ResourceError: there is no room for a single one.
    """
    taken: Counter[torch.device] = Counter()
    for store in stores:
        taken.update({at: each // store.blocks for at, each in store.bytes.items()})
    rooms = [(cache.budget(at.type, free(at), ranks), each) for at, each in taken.items()]
    if wrong := [(budget, each) for budget, each in rooms if budget < each]:
        budget, each = (x / 2**20 for x in wrong[0])
        what = f"a block of {cache.block} tokens takes {each:.2f} MiB and there are {budget:.2f} for it"
        raise ResourceError(what, fix="give cache.size more", key="cache")
    return min(budget // each for budget, each in rooms)


def free(device: torch.device) -> int:
    """Bytes of a device that can still be taken."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available("cpu")


def told(store: BlockStore) -> str:
    """A store in one line."""
    kinds = sorted({str(held.keys.dtype).removeprefix("torch.") for held in store.layers.values()})
    tokens = store.blocks * store.size
    size = f"{sum(store.bytes.values()) / 2**30:.2f} GiB of {'/'.join(kinds)}"
    return f"cache: {size} keys and values, {store.blocks} blocks of {store.size}: {tokens} tokens"
