"""Checkpoints that wrap a language model (vision, audio): which load, what of them, and that nothing is made up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmkit.core.errors import ModelError

TOWER = re.compile(r"(^|\.)(vision|visual|audio|image|multi_modal|mm)[_.]")
"""Names of what stands beside the text in a wrapper's files."""


def check_causal(config: Any, said: Mapping[str, Any], name: str) -> None:
    """Passes what transformers loads as a causal language model, and loads again when it has saved it, so that what we
    export loads there too; `said` is the model's `config.json`.

    Raises:
        ModelError: naming the architecture.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as causal

    if "AutoModelForCausalLM" in (said.get("auto_map") or ()):
        return
    own = getattr(
        causal.get(type(config), None), "config_class", None
    )  # of a wrapper, it may be that of its text alone
    if own in causal:
        return
    made = (said.get("architectures") or [type(config).__name__.removesuffix("Config")])[0]
    text = getattr(getattr(config, "text_config", None), "model_type", "")
    inside = f": transformers loads its text tower ({text}) only inside of it" if text else ""
    raise ModelError(f"{name} is a {made}, not a causal language model{inside}", fix="give its text model", key="model")


def check_whole(told: Mapping[str, Any], wrapped: bool, name: str) -> None:
    """Every weight of the model came from the files, in its shape, and the files hold nothing that it has no place for:
    transformers would make up the one and drop the other. Of a wrapper (`wrapped`), what is not text may be left.

    Raises:
        ModelError: naming the first such tensor and how many there are.
    """
    shapes = [f"{weight} of shape {list(own)}, not {list(held)}," for weight, held, own in told["mismatched_keys"]]
    odd = [weight for weight in told["unexpected_keys"] if not (wrapped and TOWER.search(weight))]
    found = (("lacks the weight", told["missing_keys"]), ("lacks", shapes), ("has no place for", odd))
    for what, weights in found:
        if weights:
            more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
            raise ModelError(f"{name} {what} {min(weights)}{more}", fix="fetch the model again", key="model")


def name_inner(model: Any) -> None:
    """Text towers of wrappers may call their inner model by the word that it has there: `base_model` is to find it."""
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"


def towers(model: Any) -> tuple[str, ...]:
    """The names of what stands beside the text of a wrapper: text never reaches it, so nothing is learned there."""
    text = getattr(model.base_model, "language_model", None)
    beside = {child for child in model.base_model.children() if child is not text} if text is not None else set()
    return tuple(name for name, module in model.named_modules() if module in beside)
