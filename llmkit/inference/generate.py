"""Text by transformers' `generate`: batched, sorted by length, greedy or sampled with a seed a prompt.

Prompts are token ids: what a model is asked is rendered in one place, `data/prompt.py`, as training renders it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from llmkit.core.seed import mixed
from llmkit.core.types import Steady
from llmkit.inference.sampling import Sampling


@dataclass(frozen=True)
class Completion:
    """What was made of one prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """stop or length"""
    prompt_tokens: int


def ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the generation configuration's and the tokenizer's."""
    said = model.generation_config.eos_token_id
    listed = said if isinstance(said, list) else [said]
    return sorted({end for end in (*listed, tokenizer.eos_token_id) if end is not None})


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch: int = 16,
    on_done: Callable[[int], None] | None = None,
) -> list[Completion]:
    """A completion for each prompt, in order. Sampled text takes one prompt at a time, so that its seed is its own."""
    size = batch if sampling.temperature == 0 and not _prepends(model) else 1
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    made: list[Completion | None] = [None] * len(prompts)
    training, done = model.training, 0
    model.eval()
    try:
        for group in (order[at : at + size] for at in range(0, len(order), size)):
            for index, completion in zip(group, _together(model, tokenizer, prompts, group, sampling), strict=True):
                made[index] = completion
            done += len(group)
            if on_done is not None:
                on_done(done)
    finally:
        model.train(training)
    return [completion for completion in made if completion is not None]


def _prepends(model: Any) -> bool:
    """Whether an adapter puts virtual tokens before each row: padding would stand between them and the prompt."""
    return hasattr(model, "peft_config") and bool(model.active_peft_config.is_prompt_learning)


def _together(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], group: Sequence[int], sampling: Sampling
) -> Iterator[Completion]:
    """One batch: padded on the left, decoded, cut at its ends."""
    given = [list(prompts[i]) for i in group]
    width = max(map(len, given))
    stop = ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stop or [0])[0]
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in given], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in given], device=device)
    if sampling.temperature > 0:
        torch.manual_seed(mixed(sampling.seed, group[0]))
    with torch.no_grad(), _without_defaults(model):
        kept = _keeps_keys(model, given, sampling.max_tokens)
        settings = _settings(sampling, stop, pad, kept)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    for row, prompt in zip(out[:, width:].tolist(), given, strict=True):
        cut = next((place for place, token in enumerate(row) if token in stop), None)
        tokens = row if cut is None else row[:cut]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        yield Completion(text, tuple(tokens), "length" if cut is None else "stop", len(prompt))


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
    stop = ends(model, tokenizer)
    pieces = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
    kept = _keeps_keys(model, [prompt], sampling.max_tokens)
    settings = _settings(sampling, stop, (stop or [0])[0], kept)
    if sampling.temperature > 0:
        torch.manual_seed(mixed(sampling.seed, 0))
    with torch.no_grad(), _without_defaults(model):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=pieces)
