"""A smaller model of the same family and tokenizer, made of chosen layers of a model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkit.core.errors import ModelError, RecipeError
from llmkit.models.attend import install
from llmkit.models.fused import fuse
from llmkit.models.layers import layers
from llmkit.models.load import Loaded

FIRST = ("first_k_dense_replace", "num_dense_layers")
"""How many of the first layers of a mixture model are dense."""
HEADS, SIZES = ("num_attention_heads", "num_key_value_heads"), ("hidden_size", "intermediate_size")


def student_of(loaded: Loaded, kept: int | Sequence[int], width: int | None, seed: int) -> Any:
    """A model of `kept` layers of a loaded one: so many from all over it, or those that are named, from 0 on.

    With `width`, hidden states are narrower: embeddings and head keep the directions in which the model's own
    embeddings vary most, and layers begin at random.

    Raises:
        RecipeError: the model has no such layers, or is not wider than that.
        ModelError: its family cannot be narrowed, or has layers of several kinds that cannot be laid so.
    """
    model, own = loaded.model, len(layers(loaded.model))
    chosen = picked(kept, own)
    config = _shorter(model.config, chosen, own)
    if width is not None:
        narrow(config.get_text_config(), width)
    torch.manual_seed(seed)
    weight = next(model.parameters())
    made: Any = type(model)(config).to(weight.device, weight.dtype)
    _check(model, made, chosen)
    install(made, "auto" if loaded.attention == "own" else loaded.attention)
    with torch.no_grad():
        _copy(model, made, chosen) if width is None else _narrowed(model, made)
    made.generation_config = copy.deepcopy(model.generation_config)
    fuse(made)
    return made.eval()


def picked(kept: int | Sequence[int], own: int) -> list[int]:
    """Which of a model's `own` layers.

    Raises:
        RecipeError: it has no such layers.
    """
    if isinstance(kept, int):
        if kept >= own:
            what = f"{kept} layers are not fewer than the {own} of the model"
            raise RecipeError(what, fix=f"give 1 to {own - 1}", key="drafter.layers")
        return [round(at * (own - 1) / max(1, kept - 1)) for at in range(kept)]
    if wrong := [at for at in kept if not 0 <= at < own]:
        what = f"{wrong[0]} is none of the {own} layers of the model"
        raise RecipeError(what, fix=f"give numbers from 0 to {own - 1}", key="drafter.layers")
    return [*kept]


def _shorter(config: Any, chosen: Sequence[int], own: int) -> Any:
    """The configuration of these layers alone: what it says of each layer it says of those that stay, and of mixture
    models which are dense."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == own and name not in ("id2label", "mlp_only_layers"):
            setattr(text, name, [value[at] for at in chosen])
    text.num_hidden_layers = len(chosen)
    for name in FIRST:
        if isinstance(value := getattr(text, name, None), int):
            setattr(text, name, sum(at < value for at in chosen))
    if isinstance(only := getattr(text, "mlp_only_layers", None), list):
        step = getattr(text, "decoder_sparse_step", 1)
        text.decoder_sparse_step = 1
        text.mlp_only_layers = [new for new, at in enumerate(chosen) if at in only or (at + 1) % step]
    return made


def _check(model: Any, made: Any, chosen: Sequence[int]) -> None:
    """Raises: ModelError: a layer was built that is not of the kind of the one that is kept."""
    theirs = layers(model)
    for ours, at in zip(layers(made), chosen, strict=True):
        kinds = [{name for name, _ in layer.named_parameters()} for layer in (ours, theirs[at])]
        if kinds[0] != kinds[1]:
            what = f"layer {at} of {type(model).__name__} is of another kind than those are that it would be among"
            raise ModelError(what, fix="keep layers of each kind in their order", key="drafter.layers")


def narrow(text: Any, width: int) -> None:
    """All sizes in the proportion of the width; heads stay as wide as they are.

    Raises:
        ModelError: the configuration has other words for its sizes.
        RecipeError: the model is no wider, or no head would be left.
    """
    if any(not isinstance(getattr(text, name, None), int) for name in (*HEADS, *SIZES)):
        what = f"a configuration of {text.model_type} has sizes that are not narrowed here"
        raise ModelError(what, fix="leave drafter.width out", key="drafter.width")
    old, heads, groups = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
    size = getattr(text, "head_dim", None) or old // heads
    keys = groups * width // old
    if width >= old or width % 2 or keys < 1:
        what = f"{width} is no width between {-(-old // groups)} and {old}" if width % 2 == 0 else f"{width} is odd"
        raise RecipeError(what, fix="give an even number in between", key="drafter.width")
    text.head_dim, text.num_key_value_heads, text.num_attention_heads = size, keys, keys * (heads // groups)
    text.intermediate_size = max(8, text.intermediate_size * width // old // 8 * 8)
    text.hidden_size = width


def _copy(model: Any, made: Any, chosen: Sequence[int]) -> None:
    """All weights, of the layers those that stay."""
    theirs, ours = layers(model), layers(made)
    inside = {id(p) for layer in theirs for p in layer.parameters()}
    rest = {name: p for name, p in model.named_parameters() if id(p) not in inside}
    own = dict(made.named_parameters())
    for name, weight in rest.items():
        own[name].copy_(weight)
    for layer, at in zip(ours, chosen, strict=True):
        state = dict(theirs[at].named_parameters())
        for name, weight in layer.named_parameters():
            weight.copy_(state[name])


def _narrowed(model: Any, made: Any) -> None:
    """Embeddings and head in the directions of the largest variance of the embeddings (principal components)."""
    whole = model.get_input_embeddings().weight.detach().float()
    main: Tensor = torch.linalg.eigh(whole.T @ whole).eigenvectors[:, -made.get_input_embeddings().weight.shape[1] :]
    made.get_input_embeddings().weight.copy_(whole @ main)
    head, own = model.get_output_embeddings(), made.get_output_embeddings()
    if own.weight is not made.get_input_embeddings().weight:
        own.weight.copy_(head.weight.detach().float() @ main)
