"""`LLM`: a model that answers, scores and embeds, in process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

import torch

from llmkit.build.adapters_of import Beside, adapters, support
from llmkit.build.adapters_of import decoder as decoder_of
from llmkit.build.opening import load
from llmkit.build.precision import types
from llmkit.core.errors import ModelError
from llmkit.data.prompt import prompt_ids
from llmkit.inference.blocks import Blocks
from llmkit.inference.check import Facts
from llmkit.inference.engine import Engine
from llmkit.inference.generate import ends
from llmkit.inference.request import Completion, Event, Output, Request, Token
from llmkit.inference.runner import Runner
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Limits
from llmkit.inference.text import Texts
from llmkit.models.load import How, Loaded
from llmkit.models.node import ModelRef
from llmkit.models.paged import BlockStore
from llmkit.models.resolve import resolve

Prompt = str | Sequence[int]


def engine_of(
    loaded: Loaded, limits: Limits = Limits(), blocks: int = 1024, size: int = 16, beside: Beside = Beside()
) -> Engine:
    """An engine over a loaded model.

    Raises:
        ModelError: the family cannot read a paged cache, or an adapter does not fit.
    """
    supported = support(loaded)
    if not supported.paged:
        what = f"{loaded.resolved.name} cannot be run by the engine: {supported.reason}"
        raise ModelError(what, fix="use generator: transformers", key="model")
    store, decoder = BlockStore(blocks, size), decoder_of(loaded)
    config = decoder.causal.config.get_text_config()
    longest = min(int(config.max_position_embeddings), blocks * size)
    facts = Facts(decoder.words, longest, tuple(ends(decoder.causal, loaded.tokenizer)))

    runner, own = Runner(decoder, store), adapters(loaded, decoder, beside)
    return Engine(runner, Blocks(blocks, size), limits, facts, Texts(loaded.tokenizer), store.copy, own)


class LLM:
    """A model by its name or folder, ready to be asked."""

    def __init__(self, model: str, *, seed: int = 0, device: str = "", precision: str = "auto") -> None:
        """
        Raises:
            ModelError: it cannot be loaded, or its family cannot be run by the engine.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        kinds, ref = types(precision, device), ModelRef(name=model)
        resolved = resolve(ref)
        self.loaded = load(resolved, ref, How(device, kinds.params, kinds.half, resolved.quant))
        self.loaded.model.eval()
        self.tokenizer = self.loaded.tokenizer
        self.engine = engine_of(self.loaded)
        self.seed, self.ids = seed, count()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        on_done: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """A completion for each prompt (text or token ids), in order; sampled ones each with a seed of their own."""
        collected = []
        for at, prompt in enumerate(prompts):
            ids = tuple(prompt_ids(self.tokenizer, prompt) if isinstance(prompt, str) else prompt)
            own = replace(sampling, seed=sampling.seed + self.seed + at) if sampling.temperature else sampling
            request = Request(str(next(self.ids)), ids, own)
            self.engine.add(request)
            collected.append(Collected(request, self.engine.texts))
        return finish(self.engine, collected, on_done)


def finish(engine: Engine, collected: Sequence[Collected], on_done: Callable[[int], None] | None) -> list[Completion]:
    """Steps until all of them have ended."""
    waiting = {one.request.id: one for one in collected}
    while waiting:
        for event in engine.step():
            if event.request in waiting and waiting[event.request].take(event):
                del waiting[event.request]
                if on_done is not None:
                    on_done(len(collected) - len(waiting))
    return [one.completion() for one in collected]


class Collected:
    """The answers to one request, as they grow."""

    def __init__(self, request: Request, texts: Texts) -> None:
        self.request, self.texts = request, texts
        self.tokens: dict[int, list[Token]] = {index: [] for index in range(request.sampling.n)}
        self.ended: dict[int, Event] = {}
        self.first: Event | None = None

    def take(self, event: Event) -> bool:
        """Whether all answers are there."""
        self.first = self.first or event
        self.tokens[event.index] += event.tokens
        if event.finish in ("error", "deadline"):
            self.ended |= dict.fromkeys(self.tokens, event)
        elif event.finish is not None:
            self.ended[event.index] = event
        return len(self.ended) == len(self.tokens)

    def completion(self) -> Completion:
        """All of it."""
        told = self.first.prompt if self.first is not None else None
        outputs = tuple(self._output(index) for index in self.tokens)
        cached, version = (self.first.cached, self.first.version) if self.first else (0, 0)
        return Completion(outputs, len(self.request.prompt), told, cached, version)

    def _output(self, index: int) -> Output:
        tokens, end = self.tokens[index], self.ended[index]
        if end.finish == "stop" and not isinstance(end.stopped, str):
            tokens = tokens[:-1]
        ids = tuple(token.id for token in tokens)
        text = self.texts.whole(ids, self.request.sampling)
        logprobs = tuple(tokens) if self.request.sampling.logprobs is not None else ()
        return Output(text, ids, str(end.finish), logprobs, end.stopped)
