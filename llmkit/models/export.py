"""Writing a Hugging Face folder that loads without us."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmkit.core.errors import ModelError
from llmkit.core.files import published
from llmkit.models.load import quiet
from llmkit.models.node import NoQuant, Quant
from llmkit.models.resolve import HUB, Resolved
from llmkit.models.rope import RopeScaling


def export(
    model: Any,
    tokenizer: Any,
    folder: Path,
    resolved: Resolved,
    quant: Quant = NoQuant(),
    rope: RopeScaling | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Writes what `write` does, whole or not at all.

    Raises:
        ModelError: a template's name would leave the folder.
    """
    with published(folder) as aside:
        write(model, tokenizer, aside, resolved, quant, rope, labels)


def write(
    model: Any,
    tokenizer: Any,
    folder: Path,
    resolved: Resolved,
    quant: Quant = NoQuant(),
    rope: RopeScaling | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Writes an adapter (peft's format) or full weights, with tokenizer and template, into a folder; `quant` and
    `rope` are how an adapter's base was held and scaled; full weights say that in `config.json`.
    `labels` are what a classifier tells apart.

    Raises:
        ModelError: a template's name would leave the folder.
    """
    base = resolved.base or resolved
    check_template_names(tokenizer)
    with quiet(), torch.no_grad():
        if hasattr(model, "peft_config"):
            for settings in model.peft_config.values():
                settings.base_model_name_or_path, settings.revision = _for_peft(base)
            model.save_pretrained(folder)
            facts = {"format": 1, "base": base.facts(), "quant": asdict(quant)}
            facts |= {"labels": list(labels)} if labels else {}
            facts |= {"rope": asdict(rope)} if rope is not None else {}
            (folder / "llmkit.json").write_text(json.dumps(facts, indent=1) + "\n")
        else:
            model.config._name_or_path = ""
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for leftover in folder.glob("README.md"):
        leftover.unlink()  # peft's empty model card
    _plain_attention(folder)


def _for_peft(base: Resolved) -> tuple[str, str | None]:
    """The name and revision by which peft finds an adapter's base: it knows the Hub and this machine's folders, and
    none of our aliases; by those `llmkit.json` lets us find it on another machine."""
    if base.source.startswith(HUB):
        return base.source.removeprefix(HUB), base.revision
    return str(base.folder.resolve()), None


def _plain_attention(folder: Path) -> None:
    """The saved configuration names no attention of ours."""
    path = folder / "config.json"
    if path.is_file():
        said = json.loads(path.read_text())
        for key in ("_attn_implementation", "attn_implementation", "_name_or_path"):
            said.pop(key, None)
        path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


def check_template_names(tokenizer: Any) -> None:
    """Raises:
    ModelError: a chat template is called by something that is no plain file name.
    """
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    for name in templates:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ModelError(f"a chat template is called {name!r}", fix="give it a plain name", key="model.template")
