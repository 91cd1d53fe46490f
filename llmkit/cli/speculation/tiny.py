"""Models of a few random weights and their tokens, made in memory."""

from __future__ import annotations

import copy
from typing import Any

import torch

from llmkit.models.attend import install
from llmkit.models.families import SMALL, tiny

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("t", "h"), ("th", "e"), ("a", "n"), ("Ġ", "a"))


def lively(words: int = SMALL["vocab_size"], seed: int = 0, **sizes: Any) -> Any:
    """A Llama whose text depends on every token of it, and on where it stands."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given = SMALL | {"vocab_size": words, "tie_word_embeddings": True, "initializer_range": 0.5} | sizes
        return ready(LlamaForCausalLM(LlamaConfig(**given)))


def ready(model: Any) -> Any:
    """With our attention."""
    install(model.eval(), "auto")
    return model


def family(name: str) -> Any:
    """A model of the family of that name (models/families.py)."""
    with torch.random.fork_rng(devices=[]):
        return ready(tiny(name))


def near(model: Any, noise: float = 0.1, seed: int = 1) -> Any:
    """Another model that is often of one mind with it: each weight moved by `noise` of its tensor's deviation."""
    made = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight), alpha=noise * float(weight.std()))
    return ready(made)


def letters() -> Any:
    """A tokenizer of 64 tokens: letters, digits and a few longer ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    single = [*"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", *'{}":,.-_()[]!?+=/']
    known = [*SPECIAL, *single, *("".join(pair) for pair in MERGES)]
    vocabulary = {token: index for index, token in enumerate([*known, *"ABCD"][: SMALL["vocab_size"]])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=list(MERGES)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)
