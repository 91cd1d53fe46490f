"""Text by transformers' `generate`: batched, sorted by length, greedy or sampled with a seed a prompt.

Prompts are token ids: what a model is asked is rendered in one place, `data/prompt.py`, as training renders it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from llmkit.core.seed import mixed
from llmkit.core.types import Steady
from llmkit.inference.node import ABLE
from llmkit.inference.request import Ask, Completion, Output, Prompt, RequestError
from llmkit.inference.sampling import Sampling
from llmkit.inference.writer import refuse, refuse_functions

AHEAD = 4
"""Batches that are sorted by length together."""


def ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the generation configuration's and the tokenizer's."""
    said = model.generation_config.eos_token_id
    listed = said if isinstance(said, list) else [said]
    return sorted({end for end in (*listed, tokenizer.eos_token_id) if end is not None})


class TransformersWriter:
    """The `transformers` member of the `generator` union, open."""

    def __init__(self, model: Any, tokenizer: Any, batch: int = 16) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch

    def each(self, asks: Iterable[Ask]) -> Iterator[Completion]:
        """A completion for each ask, in their order. Sampled text takes one prompt at a time, so that its seed is its
        own.

        Raises:
            RequestError: one asks for what `generate` cannot do.
        """
        coming = iter(asks)
        while taken := list(islice(coming, self.batch * AHEAD)):
            for ask in taken:
                _refuse(ask)
            yield from self._sorted(taken)

    def stream(self, ask: Ask, say: Callable[[str], None]) -> None:
        """The text of one answer, handed to `say` piece by piece.

        Raises:
            RequestError: it asks for what `generate` cannot do.
        """
        _refuse(ask)
        stream(self.model, self.tokenizer, ask.prompt.ids, ask.sampling, say)

    def _sorted(self, asks: Sequence[Ask]) -> list[Completion]:
        """Short prompts beside short ones."""
        made: dict[int, Completion] = {}
        order = sorted(range(len(asks)), key=lambda i: len(asks[i].prompt.ids))
        with resting(self.model):
            while order:
                group = [i for i in order if _alike(asks[i], asks[order[0]])][: self._size(asks[order[0]])]
                order = [i for i in order if i not in group]
                rows = [asks[i].prompt.ids for i in group]
                made |= zip(group, _together(self.model, self.tokenizer, rows, asks[group[0]].sampling), strict=True)
        return [made[i] for i in range(len(asks))]

    def _size(self, ask: Ask) -> int:
        return self.batch if ask.sampling.temperature == 0 and not _prepends(self.model) else 1

    def close(self) -> None:
        """The model is another's."""


def generate(
    model: Any, tokenizer: Any, prompts: Iterable[Sequence[int]], sampling: Sampling, batch: int = 16
) -> list[Completion]:
    """A completion for each prompt, in order."""
    asks = (Ask(Prompt(tuple(ids)), sampling) for ids in prompts)
    return list(TransformersWriter(model, tokenizer, batch).each(asks))


def _alike(one: Ask, other: Ask) -> bool:
    return replace(one.sampling, seed=0) == replace(other.sampling, seed=0)


def _refuse(ask: Ask) -> None:
    refuse("transformers", ask.sampling, ABLE)
    refuse_functions("transformers", ask)
    if ask.adapter:
        what = "generator transformers knows no adapters by name"
        raise RequestError(what, fix="load the adapter's folder, or use generator: engine", key="adapter")
    if not ask.prompt.ids:
        raise RequestError("holds no tokens", fix="ask something", key="prompt")


@contextmanager
def resting(model: Any) -> Iterator[None]:
    """While a model that may be in training makes text: no dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _prepends(model: Any) -> bool:
    """Whether an adapter puts virtual tokens before each row: padding would stand between them and the prompt."""
    return hasattr(model, "peft_config") and bool(model.active_peft_config.is_prompt_learning)


def _together(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Completion]:
    """One batch: padded on the left, decoded, cut at its ends."""
    given = [list(prompt) for prompt in prompts]
    width = max(map(len, given))
    stop = _stops(model, tokenizer, sampling)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stop or [0])[0]
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in given], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in given], device=device)
    if sampling.temperature > 0:
        torch.manual_seed(mixed(sampling.seed, 0))
    with torch.no_grad(), _without_defaults(model):
        kept = _keeps_keys(model, given, sampling.max_tokens)
        settings = _settings(sampling, stop, pad, kept)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    for row, prompt in zip(out[:, width:].tolist(), given, strict=True):
        cut = next((at for at, token in enumerate(row) if token in stop and at >= sampling.min_tokens), None)
        ended = None if cut is None or row[cut] not in sampling.stop_ids else row[cut]
        tokens = row if cut is None else row[:cut]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        output = Output(text, tuple(tokens), "length" if cut is None else "stop", (), ended)
        yield Completion((output,), len(prompt))


def _stops(model: Any, tokenizer: Any, sampling: Sampling) -> list[int]:
    """The tokens that end this text."""
    return sorted({*(() if sampling.ignore_eos else ends(model, tokenizer)), *sampling.stop_ids})


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """While settings of ours are in force: transformers fills what they leave unset from the model's own, such as a
    repetition penalty, and would make other text than is asked for."""
    from transformers import GenerationConfig

    holder = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, holder.generation_config = holder.generation_config, GenerationConfig()
    try:
        yield
    finally:
        holder.generation_config = own


def _keeps_keys(model: Any, prompts: Sequence[Sequence[int]], most: int) -> bool:
    """Whether cached keys stay right while a text grows: under RoPE `dynamic` and `longrope` every forward past the
    trained length turns the whole text anew."""
    turning = [module for module in model.modules() if isinstance(module, Steady)]
    return all(module.steady(len(prompt), len(prompt) + most - 1) for module in turning for prompt in prompts)


def _settings(sampling: Sampling, stop: list[int], pad: int, keeps_keys: bool = True) -> Any:
    """All that is asked of a text."""
    from transformers import GenerationConfig

    drawn: dict[str, Any] = {}
    if sampling.temperature > 0:
        drawn = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
        drawn |= {"min_p": sampling.min_p} if sampling.min_p else {}
    if sampling.repetition_penalty != 1:
        drawn["repetition_penalty"] = sampling.repetition_penalty
    if sampling.min_tokens:
        drawn["min_new_tokens"] = sampling.min_tokens
    return GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        eos_token_id=stop or None,
        pad_token_id=pad,
        use_cache=keeps_keys,
        **({"do_sample": False} | drawn),
    )


def stream(model: Any, tokenizer: Any, prompt: Sequence[int], sampling: Sampling, say: Callable[[str], None]) -> None:
    """One completion, handed to `say` piece by piece as it is made; no thread, so that what fails is raised."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):  # type: ignore[misc] # transformers has no types here
        """Text that goes to `say` and not to standard output."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text)

    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    stop = _stops(model, tokenizer, sampling)
    pieces = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
    kept = _keeps_keys(model, [prompt], sampling.max_tokens)
    settings = _settings(sampling, stop, (stop or [0])[0], kept)
    if sampling.temperature > 0:
        torch.manual_seed(mixed(sampling.seed, 0))
    with torch.no_grad(), _without_defaults(model), resting(model):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=pieces)
