"""The engine's cache for a model that is loaded: what one block takes is measured, not worked out from its family."""

from __future__ import annotations

from collections.abc import Callable

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
    """Blocks for a model, as many as the budget holds; one token is run to see what its layers keep. No more
    than for `most` tokens; `least`: the number that fits here -> the least that fits on any of the `ranks` that hold
    the model together.

    Raises:
        ResourceError: there is no room for a single block.
    """
    store = BlockStore(1, cache.block, DTYPES[cache.precision])
    one = torch.zeros(1, dtype=torch.int64, device=forward.device)
    with torch.no_grad():
        forward.hidden(one, one, Paged(store, (Span(0, 0, 1, 0, (0,)),)), [""])
    rooms = [(cache.budget(at.type, free(at), ranks), each) for at, each in store.bytes.items()]
    if wrong := [(budget, each) for budget, each in rooms if budget < each]:
        budget, each = (x / 2**20 for x in wrong[0])
        what = f"a block of {cache.block} tokens takes {each:.2f} MiB and there are {budget:.2f} for it"
        raise ResourceError(what, fix="give cache.size more", key="cache")
    fit = least(min(budget // each for budget, each in rooms))
    store.resize(fit if most is None else min(fit, -(-most // cache.block)))
    notice(told(store))
    return store


def free(device: torch.device) -> int:
    """Bytes of a device that can still be taken."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available("cpu")


def told(store: BlockStore) -> str:
    """A store in one line."""
    kinds = sorted({str(held.keys.dtype).removeprefix("torch.") for held in store.layers.values()})
    tokens = store.blocks * store.size
    size = f"{sum(store.bytes.values()) / 2**30:.2f} GiB of {'/'.join(kinds)}"
    return f"cache: {size} keys and values, {store.blocks} blocks of {store.size}: {tokens} tokens"
