"""What is known of a model before it is fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llmkit_kernels.build import place

from llmkit.models import safe
from llmkit.models.alias import ALIASES, HUB_ID, Wheel
from llmkit.models.node import ModelRef


def config_here(ref: ModelRef) -> dict[str, Any] | None:
    """The `config.json` of a model whose files are on this machine already; None where it has yet to be fetched or
    made."""
    path = _file(ref)
    return safe.read_json(path) if path is not None and path.is_file() else None


def _file(ref: ModelRef) -> Path | None:
    alias, folder = ALIASES.get(ref.name), Path(ref.name).expanduser()
    if isinstance(alias, Wheel):
        return place() / "models" / ref.name / "config.json"
    if alias is None and folder.is_dir():
        return next((p for p in (folder / "config.json", folder / "model" / "config.json") if p.is_file()), None)
    repo = alias.repo if alias is not None else ref.name
    if not re.fullmatch(HUB_ID, repo):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json", revision=ref.revision)
    return Path(found) if isinstance(found, str) else None
