"""New tokens: in the tokenizer, and rows for them in the embeddings and the head."""

from __future__ import annotations

from typing import Any

from llmkit.core.errors import ModelError
from llmkit.models.node import ModelRef


def add(tokenizer: Any, ref: ModelRef) -> None:
    """Puts `add_tokens` and `add_special_tokens` into a tokenizer.

    Raises:
        ModelError: it has one of them already.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    for key, special in (("add_tokens", False), ("add_special_tokens", True)):
        for token in getattr(ref, key):
            if token in known:
                fix = "leave it out, or train its row by adapter.trainable_tokens"
                raise ModelError(f"{token!r} is a token of {ref.name} already", fix=fix, key=f"model.{key}")
            made = AddedToken(token, special=special, normalized=False)
            tokenizer.add_tokens([made], special_tokens=special)


def added(tokenizer: Any, ref: ModelRef) -> tuple[int, ...]:
    """The ids of the tokens that the recipe added."""
    return tuple(tokenizer.convert_tokens_to_ids([*ref.add_tokens, *ref.add_special_tokens]))


def widen(model: Any, tokenizer: Any, new: tuple[int, ...]) -> None:
    """Gives every token of the tokenizer a row. Rows that the model lacks, and those of `new` tokens that it has to
    spare, are the mean of the rows of all other tokens; so each new token is at first as likely as the average one."""
    import torch

    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    rows, size = ends[0].weight.shape[0], len(tokenizer)
    fresh = sorted({*range(rows, size), *new})
    if not fresh:
        return
    old = torch.tensor(sorted(set(range(size)) - set(fresh)), device=ends[0].weight.device)
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)
        ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    with torch.no_grad():
        for held in {id(end.weight): end.weight for end in ends}.values():
            held[fresh] = held[old].float().mean(0).to(held)
        if len(ends) > 1 and getattr(ends[1], "bias", None) is not None:
            ends[1].bias[fresh] = ends[1].bias[old].mean()
