"""Which adapters, run by peft as they are, leave the order of sums to the rows of a step."""

from __future__ import annotations

from typing import Any

BY_LINEARS = ("LORA", "IA3", "PROMPT_TUNING", "P_TUNING", "LLMKIT_BOTTLENECK")
"""Kinds that multiply rows by modules of their own (which the serving twin replaces), or by one number each;
DoRA too. The others have products of their own, whose bits depend on how many rows there are."""
OWN_PRODUCTS = ("target_parameters", "use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens")
"""Settings of a LoRA that have such products too."""


def disordered(model: Any) -> str:
    """Why rows of a model depend on each other in its adapter, or nothing."""
    for settings in getattr(model, "peft_config", {}).values():
        kind = str(getattr(settings.peft_type, "value", settings.peft_type))
        if kind not in BY_LINEARS:
            return f"its adapter is a {kind.lower()}, whose products depend on how many rows there are"
        for name in OWN_PRODUCTS:
            if kind == "LORA" and getattr(settings, name, None):
                return f"its adapter uses {name}, whose products depend on how many rows there are"
    return ""
