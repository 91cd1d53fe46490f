"""A peft adapter's folder on its base, every tensor where it belongs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.core.errors import ModelError
from llmkit.core.memory import is_out_of_memory
from llmkit.models import safe
from llmkit.models.wrappers import towers

Readers = Mapping[str, Callable[[Any, Path, Sequence[str]], Any]]
"""By the `peft_type` of an adapter's folder that is not peft's: what puts it on its base, given the modules to pass."""


def adapted(model: Any, folder: Path, own: Readers | None = None) -> Any:
    """The adapter of a folder on its base.

    Raises:
        ModelError: its settings, its tensors and the base do not fit together.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel

    headers = safe.check_folder(folder, "adapter_model")
    kind = method(folder)
    if reader := (own or {}).get(kind):
        return reader(model, folder, towers(model))
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ModelError(f"its method {kind} is unknown", fix="update peft, or give another adapter", file=str(folder))
    try:
        made = PeftModel.from_pretrained(model, str(folder))
    except KeyError as cause:  # of modules that are saved whole peft looks for every tensor
        raise _unfit(f"lacks {cause.args[0]}", folder) from cause
    except (ValueError, RuntimeError, TypeError) as cause:
        if is_out_of_memory(cause):
            raise
        raise _unfit(f"does not fit its base: {_misfit(str(cause))}", folder) from cause
    _check_names(made, {name for header in headers.values() for name in header}, folder)
    return made


def method(folder: Path) -> str:
    """The `peft_type` of an adapter's folder."""
    return str(safe.read_json(folder / "adapter_config.json").get("peft_type"))


def _check_names(made: Any, found: set[str], folder: Path) -> None:
    """By the names that peft itself saves: without the embeddings none may lack, with them all have a place."""
    from peft import get_peft_model_state_dict

    needed, known = (set(get_peft_model_state_dict(made, save_embedding_layers=whole)) for whole in (False, True))
    for side, odd in (("lacks", needed - found), ("has no place for", found - known)):
        if odd:
            raise _unfit(f"{side} {min(odd)}" + (f" and {len(odd) - 1} more" if len(odd) > 1 else ""), folder)


def _unfit(what: str, folder: Path) -> ModelError:
    return ModelError(what, fix="give the base that it was made for", file=str(folder))


def _misfit(said: str) -> str:
    """What peft says, in one line: of the first tensor of another shape, both shapes."""
    shapes = re.search(r"size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)", said)
    if shapes is None:
        return (said.strip().splitlines() or ["no reason given"])[0][:200]
    return f"{shapes[1]} has shape {shapes[2]}, and its settings and base make it {shapes[3]}"
