"""What transformers plans for a family, known before its model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plans_experts(config: Mapping[str, Any]) -> bool | None:
    """Whether the family of a `config.json` has a plan for experts on several ranks; None of one that transformers does
    not know, whose code comes with the model."""
    from transformers import CONFIG_MAPPING

    text = config.get("text_config") or config
    kind = text.get("model_type") or config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return None
    return bool(getattr(CONFIG_MAPPING[kind], "base_model_ep_plan", None))
