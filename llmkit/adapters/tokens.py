"""Single rows of the embeddings that are trained beside a frozen base."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from llmkit.adapters.method import Around
from llmkit.adapters.node import Lora
from llmkit.core.errors import ModelError


def token_rows(model: Any, node: Lora, around: Around) -> dict[str, list[int]]:
    """For peft: by the last part of the name of the embeddings, and of a head of its own, the ids of their rows.

    Raises:
        ModelError: a token of `trainable_tokens` is not in the vocabulary.
    """
    ids = sorted({*around.added, *(_id(token, around.tokenizer) for token in node.trainable_tokens)})
    if not ids:
        return {}
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    ends = (model.get_input_embeddings(), None if tied else model.get_output_embeddings())
    names = [_ending(model, module) for module in ends if module is not None]
    return dict.fromkeys(names, ids)


def _ending(model: nn.Module, module: nn.Module) -> str:
    name = next(name for name, held in model.named_modules() if held is module)
    return str(name).rpartition(".")[2]


def _id(token: str, tokenizer: Any) -> int:
    known = {} if tokenizer is None else tokenizer.get_vocab()
    if token in known:
        return int(known[token])
    near = difflib.get_close_matches(token, known, 3)
    fix = f"did you mean {' or '.join(near)}?" if near else "add it by model.add_special_tokens or model.add_tokens"
    raise ModelError(f"{token!r} is no token of this vocabulary", fix=fix, key="adapter.trainable_tokens")
