"""Prompt tuning, P-tuning and prefix tuning through peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model

from llmkit.adapters.method import Around
from llmkit.adapters.prompts import PrefixTuning, PromptTuning, PTuning
from llmkit.core.errors import ModelError
from llmkit.core.memory import is_out_of_memory


def prompt_tuning(model: Any, node: PromptTuning, around: Around) -> PeftModel:
    """peft's prompt tuning over `model`.

    Raises:
        ModelError: the family does not take it, or the text has no tokens.
    """
    given = PromptTuningConfig(
        num_virtual_tokens=node.virtual_tokens,
        prompt_tuning_init="SAMPLE_VOCAB" if node.init == "vocab" else "RANDOM",
        task_type=TaskType.CAUSAL_LM,
    )
    made = _adapted(model, given)
    if node.init == "text":  # peft's own way would save the tokenizer's place on this machine
        ids = around.tokenizer(node.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ModelError(f"{node.text!r} has no tokens", fix="give another text", key="adapter.text")
        first = torch.tensor((ids * node.virtual_tokens)[: node.virtual_tokens])
        words = model.get_input_embeddings()
        with torch.no_grad():
            cast(Any, made).prompt_encoder["default"].embedding.weight.copy_(words(first.to(words.weight.device)))
    return made


def p_tuning(model: Any, node: PTuning) -> PeftModel:
    """peft's P-tuning over `model`."""
    given = PromptEncoderConfig(
        num_virtual_tokens=node.virtual_tokens,
        encoder_reparameterization_type=node.encoder.upper(),
        encoder_hidden_size=cast(int, node.hidden),
        encoder_num_layers=node.layers,
        encoder_dropout=node.dropout,
        task_type=TaskType.CAUSAL_LM,
    )
    return _adapted(model, given)


def prefix_tuning(model: Any, node: PrefixTuning) -> PeftModel:
    """peft's prefix tuning over `model`."""
    given = PrefixTuningConfig(
        num_virtual_tokens=node.virtual_tokens,
        prefix_projection=node.projection,
        encoder_hidden_size=cast(int, node.hidden),
        init_weights="zero" if node.init == "zero" else None,
        task_type=TaskType.CAUSAL_LM,
    )
    return _adapted(model, given)


@contextmanager
def _shaken(encoder: Any) -> Iterator[None]:
    """Moves an encoder as training will: at its start it may be tokens that the family finds by their embeddings, as
    Gemma 4 does, and later it is none."""
    kept = [p.detach().clone() for p in encoder.parameters()]
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(1e-2)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(encoder.parameters(), kept, strict=True):
                p.copy_(old)


def _adapted(model: Any, given: Any) -> PeftModel:
    """The adapter on its model, when every layer that it is for listens to it.

    Raises:
        ModelError: the family does not take it.
    """
    made: Any = get_peft_model(model, given).eval()
    kind = given.peft_type.value.lower()
    encoder = made.prompt_encoder["default"]
    try:
        with torch.enable_grad(), _shaken(encoder):
            # several tokens: that of padding may be all zeros, and hear nothing
            words = torch.arange(1, 8, device=made.device)[None] % model.config.get_text_config().vocab_size
            out = made(input_ids=words, use_cache=False)
            out.logits.float().square().sum().backward()
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as cause:
        if is_out_of_memory(cause):
            raise
        raise _refused(model, f"does not run with {kind}: {(str(cause).splitlines() or [''])[0][:90]}") from cause
    if not _heard(encoder, given):
        raise _refused(model, f"does not listen to {kind} in every layer")
    encoder.zero_grad(set_to_none=True)
    return cast(PeftModel, made)


def _heard(encoder: Any, given: Any) -> bool:
    """Whether what was said depends on the virtual tokens: of a prefix, on that of each layer."""
    if isinstance(given, PrefixTuningConfig) and not given.prefix_projection:
        grad = encoder.embedding.weight.grad
        return grad is not None and bool(grad.reshape(len(grad), given.num_layers, -1).any(2).any(0).all())
    return any(p.grad is not None and bool(p.grad.any()) for p in encoder.parameters())


def _refused(model: Any, what: str) -> ModelError:
    return ModelError(f"{type(model).__name__} {what}", fix="use lora", key="adapter.kind")
