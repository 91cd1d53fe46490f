"""What a stage reads on this machine: every file and model folder that it names, by digest, to know when it is new."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmkit.core.artifact import Artifact
from llmkit.core.convert import under
from llmkit.core.files import sha256
from llmkit.core.walk import each
from llmkit.data.source_nodes import Files, Hub
from llmkit.inference.speculation.node import DraftModel, Ngram, TrainedHead
from llmkit.models.alias import ALIASES, is_remote
from llmkit.models.node import ModelRef
from llmkit.rl.asked_node import Judge, Model
from llmkit.rl.environment_node import Facts
from llmkit.rl.rewards_node import Python, Schema
from llmkit.stages.constitutional import Constitutional
from llmkit.stages.draft_head import HeadDrafter
from llmkit.stages.known import ESCAPES
from llmkit.stages.serve import Serve

READ = (
    *((ModelRef, "name"), (DraftModel, "model"), (Ngram, "corpus"), (HeadDrafter, "start")),
    (Constitutional, "constitution"),
)
"""Fields that name a folder or a file which is read."""
SOUGHT = {*"*?["}
"""Letters of a pattern of names."""
MODELS = ((ModelRef, "name"), (DraftModel, "model"), (Model, "path"))
FOLDERS = (
    *((Ngram, "corpus"), (HeadDrafter, "start"), (TrainedHead, "path"), (Schema, "path"), (Facts, "path")),
    *((Serve, "key_file"), (Serve, "admin_key_file"), (Serve, "adapter_root")),
)
OWN = (Python, *ESCAPES)
"""Nodes that name code of the user's own."""
MAPS = ((Serve, "adapters"),)
"""Fields whose values are such."""


def inputs(node: Any) -> dict[str, str]:
    """sha256 by the key that names it. What is not there has none; aliases and Hub ids say what they are themselves."""
    return {key: digest for key, path in _named(node) if (digest := _digest(path))}


def missing(node: Any, earlier: Collection[str] = ()) -> Iterator[tuple[str, str, bool]]:
    """Key and name of what is to be a file or a folder of this machine, and is none, and whether it is a model; what
    the stages before leave, in the folders `earlier`, may come to be."""
    for key, name, model in _places(node):
        comes = made_by(name, earlier)
        if not (Path(name).expanduser().exists() or comes or (model and (name in ALIASES or is_remote(name)))):
            yield key, name, model


def made_by(name: str, earlier: Collection[str]) -> bool:
    """Whether it lies in one of these folders, which stages make."""
    return any(Path(name).is_relative_to(folder) for folder in earlier)


def _places(node: Any, key: str = "") -> Iterator[tuple[str, str, bool]]:
    """Key and name of what a stage reads, but for patterns, stores and templates, which say themselves what they lack;
    and whether it is a model, which may have another name than its folder's."""
    if isinstance(node, tuple | Mapping):
        for index, item in enumerate(node) if isinstance(node, tuple) else node.items():
            yield from _places(item, under(key, str(index)))
    if isinstance(node, Files):
        every = (node.path,) if isinstance(node.path, str) else node.path
        yield from ((under(key, "path"), one, False) for one in every if not (SOUGHT & {*one} or "://" in one))
    if not dataclasses.is_dataclass(node) or isinstance(node, Files | Hub):
        return
    for item in dataclasses.fields(node):
        value, path, owner = getattr(node, item.name), under(key, item.name), node.__class__
        model = (owner, item.name) in MODELS
        if isinstance(value, str) and (model or (owner, item.name) in FOLDERS):
            if value:
                yield (key if owner is ModelRef else path), value, model
        elif isinstance(node, OWN) and item.name == "ref":
            yield path, node.ref.rpartition(":")[0], False
        elif (owner, item.name) in MAPS:
            yield from ((under(path, name), folder, False) for name, folder in value.items())
        else:
            yield from _places(value, path)


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
        elif (
            isinstance(value, str)
            and value
            and (item.name in ("path", "template") or (node.__class__, item.name) in READ)
        ):
            yield path, Path(value).expanduser()
        elif isinstance(node, OWN) and item.name == "ref":
            yield path, Path(node.ref.rpartition(":")[0]).expanduser()
        else:
            yield from _named(value, path)


def models(node: Any) -> Iterator[ModelRef]:
    """All models that a stage names."""
    for _, one in each(node, (ModelRef, Model)):
        yield one if isinstance(one, ModelRef) else ModelRef(name=one.path)


def own_code(node: Any) -> Iterator[tuple[str, str]]:
    """Key and name of each function or class of the user's own that a stage runs."""
    for key, one in each(node, OWN):
        yield under(key, "ref"), one.ref


def files(node: Any) -> Iterator[str]:
    """All files of rows that a stage names, as it names them."""
    for _, one in each(node, (Files,)):
        yield from (one.path,) if isinstance(one.path, str) else one.path


def remote(node: Any, earlier: Collection[str] = ()) -> bool:
    """Whether a stage's data, a part of it, or a model that drafts or judges, is on no disk of this machine; what
    stages leave in the folders `earlier` will be."""
    if isinstance(node, tuple):
        return any(remote(item, earlier) for item in node)
    if isinstance(node, Files):
        return node.remote()
    if isinstance(node, Hub):
        return node.remote() and not made_by(node.name, earlier)
    if isinstance(node, DraftModel):
        return fetched(node.model, earlier)
    if isinstance(node, Judge) and node.model is not None:
        return fetched(node.model.name, earlier)
    if isinstance(node, Model):
        return fetched(node.path, earlier)
    if not dataclasses.is_dataclass(node):
        return False
    return any(remote(getattr(node, field.name), earlier) for field in dataclasses.fields(node))


def fetched(name: str, earlier: Collection[str] = ()) -> bool:
    """Whether a model is one that only the Hub has, and none that stages leave in the folders `earlier`."""
    return is_remote(name) and not made_by(name, earlier)


def _digest(path: Path) -> str:
    if path.is_file():
        return sha256(path)
    if (path / "manifest.json").is_file():  # a run's: its model was hashed when it was made
        files = Artifact(path).manifest.get("files", {})
        found = {name: digest for name, digest in files.items() if name.startswith("model/")}
    else:
        found = {file.name: sha256(file) for file in sorted(path.glob("*.safetensors"))}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else ""
