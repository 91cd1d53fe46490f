"""Text by transformers' `generate`: batched, sorted by length, greedy or sampled with a seed a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmkit.core.errors import ModelError
from llmkit.core.seed import mixed
from llmkit.inference.node import Sampling


@dataclass(frozen=True)
class Completion:
    """What was made of one prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """stop or length"""
    prompt_tokens: int


def encode(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a text, or of a list of messages through the chat template with its generation prompt.

    Raises:
        ModelError: there are messages and no chat template.
    """
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids or [tokenizer.bos_token_id or tokenizer.eos_token_id]
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template", fix="give text, or set model.template", key="model.template"
        )
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the generation configuration's and the tokenizer's."""
    said = model.generation_config.eos_token_id
    listed = said if isinstance(said, list) else [said]
    return sorted({end for end in (*listed, tokenizer.eos_token_id) if end is not None})


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    sampling: Sampling,
    batch: int = 16,
    on_done: Callable[[int], None] | None = None,
) -> list[Completion]:
    """A completion for each prompt, in order. Sampled text takes one prompt at a time, so that its seed is its own."""
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    size = batch if sampling.temperature == 0 else 1
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    made: list[Completion | None] = [None] * len(encoded)
    training, done = model.training, 0
    model.eval()
    try:
        for group in (order[at : at + size] for at in range(0, len(order), size)):
            for index, completion in zip(group, _together(model, tokenizer, encoded, group, sampling), strict=True):
                made[index] = completion
            done += len(group)
            if on_done is not None:
                on_done(done)
    finally:
        model.train(training)
    return [completion for completion in made if completion is not None]


def _together(
    model: Any, tokenizer: Any, encoded: Sequence[list[int]], group: Sequence[int], sampling: Sampling
) -> Iterator[Completion]:
    """One batch: padded on the left, decoded, cut at its ends."""
    width = max(len(encoded[i]) for i in group)
    stop = ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stop or [0])[0]
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in group], device=device)
    mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in group], device=device)
    if sampling.temperature > 0:
        torch.manual_seed(mixed(sampling.seed, group[0]))
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=_settings(sampling, stop, pad))
    for row, index in zip(out[:, width:].tolist(), group, strict=True):
        cut = next((place for place, token in enumerate(row) if token in stop), None)
        tokens = row if cut is None else row[:cut]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        yield Completion(text, tuple(tokens), "length" if cut is None else "stop", len(encoded[index]))


def _settings(sampling: Sampling, stop: list[int], pad: int) -> Any:
    """Ours alone: a model's own sampling defaults do not leak in."""
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
    return GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        eos_token_id=stop or None,
        pad_token_id=pad,
        **({"do_sample": False} | drawn),
    )


def stream(model: Any, tokenizer: Any, prompt: Any, sampling: Sampling) -> Iterator[str]:
    """One completion, piece by piece as it is made."""
    from threading import Thread

    from transformers import TextIteratorStreamer

    ids = torch.tensor([encode(tokenizer, prompt)], device=next(model.parameters()).device)
    stop = ends(model, tokenizer)
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = _settings(sampling, stop, (stop or [0])[0])
    if sampling.temperature > 0:
        torch.manual_seed(mixed(sampling.seed, 0))
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "generation_config": settings,
        "streamer": pieces,
    }
    thread = Thread(target=model.generate, kwargs=given, daemon=True)
    thread.start()
    yield from pieces
    thread.join()
