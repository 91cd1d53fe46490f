"""The engine over a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from llmkit_kernels.build import lacks

from llmkit.build.adapters_of import Beside, adapters, adapters_in, support
from llmkit.build.adapters_of import decoder as decoder_of
from llmkit.build.cache import Caches, measured
from llmkit.build.drafting import Drafting
from llmkit.build.placed import place
from llmkit.core.errors import ModelError
from llmkit.inference.adapters import Adapters
from llmkit.inference.blocks import Blocks
from llmkit.inference.check import Facts
from llmkit.inference.engine import Engine
from llmkit.inference.generate import ends
from llmkit.inference.node import OwnEngine
from llmkit.inference.ranks import Led
from llmkit.inference.runner import Forward, Runner
from llmkit.inference.scheduler import GPU_TOKENS, Limits
from llmkit.inference.speculation.node import Ngram, Speculation
from llmkit.inference.speculation.source import Source
from llmkit.inference.speculation.speculator import Speculator
from llmkit.inference.text import Texts
from llmkit.models.decoder import Decoder
from llmkit.models.load import Loaded
from llmkit.models.paged import BlockStore
from llmkit.models.positions import steady_length


def engine_of(
    loaded: Loaded,
    how: OwnEngine = OwnEngine(),
    beside: Beside = Beside(),
    model: Any = None,
    most: int | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> Engine:
    """An engine over a loaded model, with the adapters that it is to know; or over `model`, which is it with an adapter
    in training, as it is at each step. `most`: tokens that its cache need not hold more of.

    Raises:
        ModelError: the family cannot read a paged cache or be run exactly, or an adapter does not fit.
        ResourceError: there is no room for a cache.
    """
    if model is None:
        check_engine(loaded)
    decoder = decoder_of(loaded, how.exact) if model is None else Decoder(model, exact=how.exact)
    if how.placement is not None:
        place(decoder, how.placement)
    own = adapters(loaded, decoder, beside) if model is None else Adapters()
    store = measured(decoder, how.cache)
    return _engine(decoder, decoder, store, Caches(store, how.cache, notice, most), loaded, how, own)


def engine_over(loaded: Loaded, led: Led, how: OwnEngine, beside: Beside = Beside()) -> Engine:
    """An engine over a model that several ranks hold together, on the first of them.

    Raises:
        ModelError: an adapter does not fit.
    """
    resolved = loaded.resolved
    own = adapters_in(led, beside, resolved.folder if resolved.base is not None else None)
    decoder, store, cache = cast(Decoder, led.rank.forward), cast(BlockStore, led.rank.store), how.cache
    if decoder.device.type == "cpu":  # which all ranks share
        cache = replace(cache, size=sum(store.bytes.values()))
    caches = Caches(store, cache, most=store.blocks * store.size, resize=led.resize)
    return _engine(led, decoder, led, caches, loaded, how, own)


def _engine(
    forward: Forward,
    decoder: Decoder,
    moves: Led | BlockStore,
    caches: Caches,
    loaded: Loaded,
    how: OwnEngine,
    own: Adapters,
) -> Engine:
    """`decoder` is what of the model lies here; `moves` copies in all stores."""
    tokenizer, store, asked = loaded.tokenizer, caches.store, how.speculation
    drafting = Drafting(decoder, loaded, caches, forward)
    drafts = None if asked is None else Speculator(_sources(asked, drafting), asked.fixed)
    caches.settle()
    longest = steady_length(decoder.causal, store.blocks * store.size)
    facts = Facts(decoder.words, longest, tuple(ends(decoder.causal, tokenizer)))
    tokens = how.tokens or (Limits.tokens if forward.device.type == "cpu" else GPU_TOKENS)
    limits, blocks = Limits(tokens, how.sequences), Blocks(store.blocks, store.size)
    lacks("draw")  # compiled now, if it has to be, and not in the midst of a step
    texts = Texts(tokenizer)
    return Engine(Runner(forward, store), blocks, limits, facts, texts, moves.copy, own, drafts, moves.move)


def _sources(asked: Speculation, drafting: Drafting) -> list[Source]:
    """Who drafts; beside one that takes time what is found by looking back, which takes next to none."""
    nodes = [Ngram(), asked] if asked.lookup else [asked]
    return [Source(node.drafter(drafting), node.tokens, node.kind, drafting.words) for node in nodes]


def check_engine(loaded: Loaded) -> None:
    """Raises: ModelError when the engine cannot run the model."""
    if loaded.head is not None:
        what = f"{loaded.resolved.name} is a {loaded.head.task} classifier, and writes no text"
        raise ModelError(what, fix="evaluate it with a task of kind classification", key="model")
    supported = support(loaded)
    if not supported.paged:
        what = f"{loaded.resolved.name} cannot be run by the engine: {supported.reason}"
        raise ModelError(what, fix="use generator: {kind: transformers}", key="generator")
