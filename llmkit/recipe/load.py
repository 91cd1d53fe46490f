"""A recipe file, what it extends, and the command line's overrides, to typed stages."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from llmkit.core.config import Later
from llmkit.core.convert import Origin, Report, Value, convert
from llmkit.core.errors import RecipeError
from llmkit.recipe.parse import parse, parse_file
from llmkit.stages.evaluate import Evaluate
from llmkit.stages.merge import Merge
from llmkit.stages.sft import Sft

Stage = Annotated[
    Sft | Evaluate | Merge,
    Later(
        tuple(
            [
                "pretrain",
                "classify",
                "reward",
                "preference",
                "policy",
                "ppo",
                "draft",
                "distill",
                "constitutional",
                "trl",
                "audit",
                "calibrate",
                "quantize",
                "prune",
                "convert",
                "export",
                "serve",
                "release",
                "monitor",
                "retrain",
                "experiment",
                "federated",
                "dpo",
                "ipo",
                "simpo",
                "orpo",
                "cpo",
                "kto",
                "apo",
                "grpo",
                "dr_grpo",
                "dapo",
                "gspo",
                "cispo",
                "rloo",
                "reinforce",
            ]
        )
    ),
]


@dataclass(frozen=True)
class Recipe:
    """What a recipe says: its stages in order, and where every value came from."""

    stages: tuple[tuple[str, Any], ...]
    """(name, node); one stage at the top level has the name ''."""
    origins: Mapping[str, Origin]
    text: str = ""
    """As written."""
    shown: Mapping[str, str] = field(default_factory=dict)
    """Dotted key -> the text to show in place of a value that was read from the environment."""

    @property
    def out(self) -> Path:
        """The folder that holds the whole run."""
        return Path(self.stages[0][1].out).parent if self.stages[0][0] else Path(self.stages[0][1].out)


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """The recipe of a file with `key.path=value` overrides, a mapping or a list of texts.

    Raises:
        RecipeError: with every problem of the recipe, each with its file and line.
    """
    path = Path(path)
    root = Path.cwd() if path.resolve().is_relative_to(Path.cwd()) else path.resolve().parent
    tree = _extended(path, root, ())
    for key, value in _overrides(overrides):
        tree = _put(tree, key.split("."), value, key)
    environment: dict[str, str] = {}
    report = Report()
    tree = _expanded(tree, "", environment, report)
    stages = _stages(tree, report)
    if report.problems:
        raise RecipeError(problems=report.problems)
    return Recipe(tuple(stages), report.origins, path.read_text("utf-8-sig"), environment)


def _extended(path: Path, root: Path, chain: tuple[Path, ...]) -> Value:
    """The tree of a file over the trees that it extends."""
    here = path.resolve()
    tree = parse_file(path)
    if not isinstance(tree.held, dict):
        raise RecipeError("holds no mapping at the top", fix="write `key: value` lines", file=str(path), line=1)
    if "extends" not in tree.held:
        return tree
    said = tree.held["extends"]
    names = said.held if isinstance(said.held, list) else [said]
    merged = Value({}, tree.origin)
    for name in names:
        place = {"file": str(path), "line": name.origin.line, "key": "extends"}
        if not isinstance(name.held, str):
            raise RecipeError("is not a file or a list of files", fix="give a path", **place)
        other = (path.parent / name.held).resolve()
        steps = [*chain, here, other]
        if other in (*chain, here):
            raise RecipeError(f"goes in a circle: {_chain(steps)}", fix="take one link away", **place)
        if not other.is_relative_to(root):
            raise RecipeError(
                f"{name.held} lies outside {root.name or root}", fix="keep recipes in one folder", **place
            )
        if not other.is_file():
            raise RecipeError(f"{name.held} does not exist ({_chain(steps)})", fix="mend the path", **place)
        merged = merge(merged, _extended(_near(other), root, (*chain, here)))
    own = {key: value for key, value in tree.held.items() if key != "extends"}
    return merge(merged, replace(tree, held=own))


def _near(path: Path) -> Path:
    """A path as a user would write it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _chain(paths: Sequence[Path]) -> str:
    return " -> ".join(path.name for path in paths)


def merge(below: Value, above: Value) -> Value:
    """`above` over `below`: mappings merge, all else replaces; a mapping of another kind replaces too."""
    if not isinstance(below.held, dict) or not isinstance(above.held, dict):
        return above
    kinds = [tree.held["kind"].held for tree in (below, above) if "kind" in tree.held]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        return above
    held = dict(below.held)
    for key, value in above.held.items():
        held[key] = merge(held[key], value) if key in held else value
    return replace(above, held=held, keys={**below.keys, **above.keys})


def _overrides(given: Mapping[str, Any] | Sequence[str]) -> list[tuple[str, Value]]:
    if isinstance(given, Mapping):
        return [(key, Value(value, Origin("command line"))) for key, value in given.items()]
    made = []
    for text in given:
        key, found, value = text.partition("=")
        if not found or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key):
            raise RecipeError(f"{text!r} is no override", fix="write key.path=value")
        tree = (
            parse(value, "command line", "command line") if value.strip() else Value("", Origin("command line"), False)
        )
        made.append((key, tree))
    return made


def _put(tree: Value, path: list[str], value: Value, key: str) -> Value:
    """`tree` with `value` at `path`; a list takes an index, `stages` a name."""
    if not path:
        return merge(tree, value) if isinstance(value.held, dict) else value
    first, rest, command = path[0], path[1:], Origin("command line")
    if isinstance(tree.held, list):
        names = [
            item.held["name"].held if isinstance(item.held, dict) and "name" in item.held else "" for item in tree.held
        ]
        index = names.index(first) if first in names else int(first) if first.isdigit() else -1
        if not 0 <= index < len(tree.held):
            known = ", ".join(filter(None, names)) or f"0 to {len(tree.held) - 1}"
            raise RecipeError(f"names nothing ({first})", fix=f"use one of {known}", key=key)
        return replace(tree, held=[_put(v, rest, value, key) if i == index else v for i, v in enumerate(tree.held)])
    if not isinstance(tree.held, dict):
        short = {} if tree.held is None else {"kind" if first != "name" else "": tree}
        tree = Value({k: v for k, v in short.items() if k}, command)
    inner = tree.held.get(first, Value({} if rest else None, command))
    keys = {**tree.keys, first: command}
    return replace(tree, held={**tree.held, first: _put(inner, rest, value, key)}, keys=keys)


def _expanded(tree: Value, key: str, environment: dict[str, str], report: Report) -> Value:
    """The tree with each `${env:NAME}` read; the text as written is kept beside it, to be shown and saved."""
    if isinstance(tree.held, dict):
        held = {k: _expanded(v, f"{key}.{k}" if key else k, environment, report) for k, v in tree.held.items()}
        return replace(tree, held=held)
    if isinstance(tree.held, list):
        return replace(tree, held=[_expanded(v, f"{key}.{i}", environment, report) for i, v in enumerate(tree.held)])
    if not isinstance(tree.held, str) or "${" not in tree.held:
        return tree
    for name in re.findall(r"\$\{env:([^}]*)\}", tree.held):
        if name not in os.environ:
            report.add(f"the environment has no {name}", f"export {name}=...", key, tree.origin)
    text = re.sub(r"\$\{env:([^}]*)\}", lambda match: os.environ.get(match[1], ""), tree.held)
    if text != tree.held:
        environment[key] = tree.held
    return replace(tree, held=text)


def _stages(tree: Value, report: Report) -> list[tuple[str, Any]]:
    if "stages" not in tree.held:
        node = convert(Stage, tree, "", report)
        return [("", node)]
    for name in tree.held:
        if name not in ("stages", "defaults", "out"):
            origin = tree.keys.get(name, tree.origin)
            report.add("unknown key beside stages", "use stages, defaults and out", name, origin)
    listed = tree.held["stages"]
    if not isinstance(listed.held, list) or not listed.held:
        report.add("is not a list of stages", "write `- name: ...` items", "stages", listed.origin)
        return []
    return _pipeline(tree, listed, report)


def _pipeline(tree: Value, listed: Value, report: Report) -> list[tuple[str, Any]]:
    stages: list[tuple[str, Any]] = []
    folders: dict[str, str] = {}
    out = tree.held.get("out", Value("runs/pipeline", Origin("default")))
    for index, item in enumerate(listed.held):
        key = f"stages.{index}"
        name = item.held.get("name") if isinstance(item.held, dict) else None
        if name is None or not isinstance(name.held, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name.held):
            report.add("has no plain name", "add name: letters, digits, - and _", key, item.origin)
            continue
        if name.held in folders:
            report.add(f"a second stage is called {name.held}", "give each its own name", f"{key}.name", name.origin)
            continue
        own = _with_defaults(tree.held.get("defaults"), item, report)
        own["out"] = replace(out, held=str(Path(str(out.held)) / name.held))
        body = _linked(Value(own, item.origin, keys=item.keys), folders, f"stages.{name.held}", report)
        node = convert(Stage, body, f"stages.{name.held}", report)
        folders[name.held] = own["out"].held
        stages.append((name.held, node))
    return stages


def _with_defaults(defaults: Value | None, item: Value, report: Report) -> dict[str, Value]:
    """A stage's own keys over those defaults that its kind has."""
    import dataclasses

    own = {key: value for key, value in item.held.items() if key != "name"}
    if defaults is None or not isinstance(defaults.held, dict):
        return own
    kinds = {"sft": Sft, "evaluate": Evaluate, "merge": Merge}
    kind = own.get("kind")
    cls: Any = kinds.get(kind.held) if kind is not None else None
    known = {f.name for f in dataclasses.fields(cls)} if cls is not None else set()
    everywhere = {f.name for made in kinds.values() for f in dataclasses.fields(made)}
    shared = {k: v for k, v in defaults.held.items() if k in known or k not in everywhere}
    merged: dict[str, Value] = merge(Value(shared), Value(own)).held
    return merged


def _linked(tree: Value, folders: Mapping[str, str], key: str, report: Report) -> Value:
    """The tree with each `${stages.NAME}` turned into the folder of an earlier stage."""
    if isinstance(tree.held, dict):
        return replace(tree, held={k: _linked(v, folders, f"{key}.{k}", report) for k, v in tree.held.items()})
    if isinstance(tree.held, list):
        return replace(tree, held=[_linked(v, folders, f"{key}.{i}", report) for i, v in enumerate(tree.held)])
    match = re.fullmatch(r"\$\{stages\.([^}]*)\}", tree.held) if isinstance(tree.held, str) else None
    if match is None:
        if isinstance(tree.held, str) and "${" in tree.held:
            report.add(f"{tree.held} refers to nothing", "write ${env:NAME} or ${stages.NAME}", key, tree.origin)
        return tree
    if match[1] not in folders:
        known = ", ".join(folders) or "none: it is the first"
        report.add(
            f"no earlier stage is called {match[1]}", f"use one of the earlier stages ({known})", key, tree.origin
        )
        return tree
    return replace(tree, held=folders[match[1]])


def digest(node: Any) -> str:
    """sha256 of a stage's values without `out`."""
    values = plain(node)
    values.pop("out", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def plain(node: Any) -> Any:
    """A node as JSON values."""
    import dataclasses

    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {item.name: plain(getattr(node, item.name)) for item in dataclasses.fields(node)}
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    return [plain(item) for item in node] if isinstance(node, list | tuple) else node
