"""What drafts for a model says which one it was made for, and is refused for another.

A model is known by its weights and not by its name: an alias, the Hub's folder and a copy of either are one. Files that
are the same to the byte say so at once. Where they are not (another cut into shards, other notes in a header), the
tensors in them decide. What is attached to the weights counts as they do: an adapter changes what is said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from llmkit.core.artifact import Artifact
from llmkit.core.errors import ModelError
from llmkit.core.files import write_json
from llmkit.models import safe
from llmkit.models.resolve import Resolved

NAME, VERSION = "draft.json", 1
CHUNK = 1 << 24
NAMES = ("base_model_name_or_path", "revision", "inference_mode")
"""What of an adapter's settings says where things lie, and changes nothing of what it does."""
AGAIN = "run kind: draft for it"


@dataclass(frozen=True)
class Target:
    """A model that is drafted for."""

    name: str
    """As it was called: for people, and never compared."""
    files: str
    """Over the digests of its weight files, its adapter's too."""
    tensors: str
    """Over its tensors, whatever files they lie in."""
    vocabulary: str
    """Over its tokenizer's words and their ids."""


@dataclass(frozen=True)
class Made:
    """What `draft.json` says."""

    kind: str
    settings: Mapping[str, Any]
    target: Target


def identity(resolved: Resolved, tokenizer: Any) -> Target:
    """A model as what drafts for it knows it; all of its weights are read."""
    return Target(resolved.name, _files(resolved), _tensors(resolved), vocabulary(tokenizer))


def vocabulary(tokenizer: Any) -> str:
    """sha256 over a tokenizer's words and their ids, those that were added too."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def write(folder: Path, kind: str, settings: Mapping[str, Any], target: Target) -> None:
    """`draft.json` beside what drafts."""
    write_json(folder / NAME, {"version": VERSION, "kind": kind, "settings": dict(settings), "target": asdict(target)})


def folder_of(name: str, key: str) -> Path:
    """The folder of what `kind: draft` left, by its own path or by its run's, whose files are looked at.

    Raises:
        ModelError: there is none, or a file has changed.
    """
    path = Path(name).expanduser()
    if (path / "manifest.json").is_file():
        Artifact(path).verify("model/")
        path = path / "model"
    if not (path / NAME).is_file():
        what = f"{name} holds nothing that drafts" + ("" if path.is_dir() else ": it is no folder")
        raise ModelError(what, fix="give a folder that kind: draft made", key=key)
    return path


@contextmanager
def remade(key: str) -> Iterator[None]:
    """What is wrong with a file of what `kind: draft` left is told at `key`; the way out is to make it again."""
    try:
        yield
    except ModelError as error:
        error.each(lambda said: replace(said, fix="run kind: draft again", key=key))
        raise


def read(folder: Path, kind: str, key: str) -> Made:
    """What `draft.json` says of something that drafts as `kind` does.

    Raises:
        ModelError: it is of another kind or version, or is no such file.
    """
    path = folder / NAME
    with remade(key):
        said = safe.read_json(path)
    if said.get("version") != VERSION:
        what = f"is of version {said.get('version')!r:.40}, and {VERSION} is read here"
        raise ModelError(what, fix="run kind: draft again", file=str(path), key=key)
    if said.get("kind") != kind:
        what = f"{folder} is of drafter.kind {said.get('kind')!r:.40}, not {kind}"
        raise ModelError(what, fix="name the folder of another, or use its kind of speculation", key=key)
    target, settings = said.get("target"), said.get("settings")
    names = [item.name for item in fields(Target)]
    whole = isinstance(target, dict) and isinstance(settings, dict)
    if not isinstance(target, dict) or not whole or not all(isinstance(target.get(name), str) for name in names):
        raise ModelError("does not say what it drafts for", fix="run kind: draft again", file=str(path), key=key)
    return Made(kind, settings if isinstance(settings, dict) else {}, Target(**{name: target[name] for name in names}))


def check(folder: Path, made: Made, resolved: Resolved, tokenizer: Any, key: str, again: str = AGAIN) -> None:
    """Sees to it that what drafts was made for this model; `again` is the way out where it was
    made for other weights of the same tokens.

    Raises:
        ModelError: it was made for another, both of which are named.
    """
    target = made.target
    if target.vocabulary != vocabulary(tokenizer):
        what = f"{folder} was made for {target.name}, whose tokens are others than those of {resolved.name}"
        raise ModelError(what, fix=AGAIN, key=key)
    if target.files == (files := _files(resolved)) or target.tensors == _tensors(resolved):
        return
    what = f"{folder} was made for {target.name} ({target.files[:12]}), and not for {resolved.name} ({files[:12]})"
    raise ModelError(what, fix=again, key=key)


def _files(resolved: Resolved) -> str:
    return safe.identity({"weights": resolved.sha256} | _around(resolved, _files))


def _around(resolved: Resolved, of: Callable[[Resolved], str]) -> dict[str, str]:
    """Of an adapter: how it is applied, and its base as `of` tells it."""
    if resolved.base is None:
        return {}
    settings = safe.read_json(resolved.folder / "adapter_config.json")
    kept = json.dumps({name: value for name, value in settings.items() if name not in NAMES}, sort_keys=True)
    return {"adapter's settings": hashlib.sha256(kept.encode()).hexdigest(), "base": of(resolved.base)}


def _tensors(resolved: Resolved) -> str:
    """Over the name, the type, the shape and the bytes of each tensor, in the order of their names."""
    found = {}
    stem = "model" if resolved.base is None else "adapter_model"
    for name, header in safe.check_folder(resolved.folder, stem).items():
        with (resolved.folder / name).open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            for tensor, item in header.items():
                begin, end = item["data_offsets"]
                file.seek(start + begin)
                hashed = hashlib.sha256(json.dumps([item["dtype"], item["shape"]]).encode())
                for at in range(begin, end, CHUNK):
                    hashed.update(file.read(min(CHUNK, end - at)))
                found[tensor] = hashed.hexdigest()
    return safe.identity(found | _around(resolved, _tensors))
