"""What a stage reads on this machine: every file and model folder that it names, by digest, to know when it is new."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.core.artifact import Artifact
from llmkit.core.convert import under
from llmkit.core.files import sha256
from llmkit.data.source_nodes import Files, Hub
from llmkit.inference.speculation.node import DraftModel, Ngram
from llmkit.models.alias import is_remote
from llmkit.models.node import ModelRef
from llmkit.stages.draft_head import HeadDrafter

READ = ((ModelRef, "name"), (DraftModel, "model"), (Ngram, "corpus"), (HeadDrafter, "start"))
"""Fields that name a folder which is read."""


def inputs(node: Any) -> dict[str, str]:
    """sha256 by the key that names it. What is not there has none; aliases and Hub ids say what they are themselves."""
    return {key: digest for key, path in _named(node) if (digest := _digest(path))}


def _named(node: Any, key: str = "") -> Iterator[tuple[str, Path]]:
    if isinstance(node, tuple):
        for index, item in enumerate(node):
            yield from _named(item, under(key, str(index)))
    if not dataclasses.is_dataclass(node):
        return
    for item in dataclasses.fields(node):
        value, path = getattr(node, item.name), under(key, item.name)
        if isinstance(node, Files | Hub) and item.name == ("name" if isinstance(node, Hub) else "path"):
            for file in node.here():
                yield (path if file == value else f"{path}: {file}"), Path(file)
        elif isinstance(value, str) and (item.name in ("path", "template") or (node.__class__, item.name) in READ):
            yield path, Path(value).expanduser()
        else:
            yield from _named(value, path)


def remote(node: Any) -> bool:
    """Whether a stage's data, a part of it, or a model that drafts for its own, is on no disk of this machine."""
    if isinstance(node, tuple):
        return any(map(remote, node))
    if isinstance(node, Files | Hub):
        return node.remote()
    if isinstance(node, DraftModel):
        return is_remote(node.model)
    return dataclasses.is_dataclass(node) and any(remote(getattr(node, f.name)) for f in dataclasses.fields(node))


def _digest(path: Path) -> str:
    if path.is_file():
        return sha256(path)
    if (path / "manifest.json").is_file():  # a run's: its model was hashed when it was made
        files = Artifact(path).manifest.get("files", {})
        found = {name: digest for name, digest in files.items() if name.startswith("model/")}
    else:
        found = {file.name: sha256(file) for file in sorted(path.glob("*.safetensors"))}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else ""
