"""The engine over a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit.core.errors import ModelError
from llmkit.inference.blocks import Blocks
from llmkit.inference.engine import Engine, Facts
from llmkit.inference.generate import ends
from llmkit.inference.node import OwnEngine
from llmkit.inference.runner import Runner
from llmkit.inference.scheduler import Limits
from llmkit.inference.text import Stops
from llmkit.models.decoder import Decoder
from llmkit.models.load import Loaded
from llmkit.models.paged import BlockStore
from llmkit.models.positions import steady_length

BLOCKS = 1024


def engine_of(loaded: Loaded, how: OwnEngine = OwnEngine(), model: Any = None) -> Engine:
    """An engine over a loaded model, or over `model`: it with an adapter in training.

    Raises:
        ModelError: the family cannot read a paged cache.
    """
    check_engine(loaded)
    store, decoder = BlockStore(BLOCKS, how.block), Decoder(loaded.model if model is None else model)
    longest = steady_length(decoder.causal, BLOCKS * how.block)
    words = len(decoder.causal.get_output_embeddings().weight)
    facts = Facts(words, longest, tuple(ends(decoder.causal, loaded.tokenizer)))

    def stops(texts: Sequence[str]) -> Stops:
        return Stops(loaded.tokenizer, texts)

    limits = Limits(how.tokens, how.sequences)
    return Engine(Runner(decoder, store), Blocks(BLOCKS, how.block), limits, facts, stops, store.copy)


def check_engine(loaded: Loaded) -> None:
    """Raises: ModelError when the engine cannot run the model."""
    if loaded.head is not None:
        what = f"{loaded.resolved.name} is a {loaded.head.task} classifier, and writes no text"
        raise ModelError(what, fix="evaluate it with a task of kind classification", key="model")
    if not loaded.support.paged:
        what = f"{loaded.resolved.name} cannot be run by the engine: {loaded.support.reason}"
        raise ModelError(what, fix="use generator: {kind: transformers}", key="generator")
