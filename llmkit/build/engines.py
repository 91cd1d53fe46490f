"""The engine over a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmkit_kernels.build import lacks

from llmkit.build.adapters_of import Beside, adapters, support
from llmkit.build.adapters_of import decoder as decoder_of
from llmkit.build.cache import store_of
from llmkit.core.errors import ModelError
from llmkit.inference.adapters import Adapters
from llmkit.inference.blocks import Blocks
from llmkit.inference.check import Facts
from llmkit.inference.engine import Engine
from llmkit.inference.generate import ends
from llmkit.inference.node import OwnEngine
from llmkit.inference.runner import Runner
from llmkit.inference.scheduler import Limits
from llmkit.inference.text import Texts
from llmkit.models.decoder import Decoder
from llmkit.models.load import Loaded
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
    own = adapters(loaded, decoder, beside) if model is None else Adapters()
    store = store_of(decoder, how.cache, notice, most)
    longest = steady_length(decoder.causal, store.blocks * store.size)
    facts = Facts(decoder.words, longest, tuple(ends(decoder.causal, loaded.tokenizer)))
    limits, runner = Limits(how.tokens, how.sequences), Runner(decoder, store)
    lacks("draw")  # compiled now, if it has to be, and not in the midst of a step
    blocks = Blocks(store.blocks, store.size)
    return Engine(runner, blocks, limits, facts, Texts(loaded.tokenizer), store.copy, own)


def check_engine(loaded: Loaded) -> None:
    """Raises: ModelError when the engine cannot run the model."""
    if loaded.head is not None:
        what = f"{loaded.resolved.name} is a {loaded.head.task} classifier, and writes no text"
        raise ModelError(what, fix="evaluate it with a task of kind classification", key="model")
    supported = support(loaded)
    if not supported.paged:
        what = f"{loaded.resolved.name} cannot be run by the engine: {supported.reason}"
        raise ModelError(what, fix="use generator: {kind: transformers}", key="generator")
