"""A model's configuration with the recipe's RoPE scaling in it, and whether the loaded model really turns so."""

from __future__ import annotations

from typing import Any

from llmkit.core.errors import ModelError
from llmkit.models.resolve import Resolved
from llmkit.models.rope import GLOBAL, RopeScaling, reach


def scaled_config(base: Resolved, rope: RopeScaling | None, allow_code: bool = False) -> Any:
    """The configuration of a model's folder for transformers, scaled.

    Raises:
        ValueError, KeyError, OSError: transformers cannot read it.
        ModelError: it cannot be scaled.
    """
    from transformers import AutoConfig

    made = AutoConfig.from_pretrained(base.folder, trust_remote_code=allow_code)
    if rope is not None:
        rope.apply(made.get_text_config())
    return made


def check_turned(model: Any, rope: RopeScaling) -> None:
    """Raises:
    ModelError: the model has no rotary module that follows the scaling: its family turns in a way of its own.
    """
    found = [getattr(module, "rope_type", None) for module in model.modules()]
    if rope.kind not in [kind.get(GLOBAL) if isinstance(kind, dict) else kind for kind in found]:
        what = f"{type(model).__name__} turns in a way of its own, which RoPE `{rope.kind}` does not reach"
        raise ModelError(what, fix="drop model.rope", key="model.rope")


def stretch(tokenizer: Any, model: Any, rope: RopeScaling) -> None:
    """A tokenizer that knows the trained length learns the one that the model is scaled to."""
    tokenizer.model_max_length = max(tokenizer.model_max_length, reach(model.config.get_text_config(), rope))
