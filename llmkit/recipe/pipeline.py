"""`stages:`: several stages in order, what they share, and how a later one names an earlier one's result."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.core.convert import convert, under
from llmkit.core.scalars import Value
from llmkit.core.wording import Report, unknown
from llmkit.recipe.extend import merge
from llmkit.recipe.kinds import KINDS, Stage
from llmkit.recipe.shorts import full, whole
from llmkit.stages.merge import Merge
from llmkit.stages.training import Training

TOP = ["stages", "defaults", "out"]
SHARED = list(dict.fromkeys(f.name for cls in KINDS.values() for f in dataclasses.fields(cls) if f.name != "out"))
ENV = r"\$\{env:([^}]*)\}"


def read_stages(tree: Value, report: Report) -> list[tuple[str, Any]]:
    """(name, node) of each stage; a single stage at the top level has the name ''."""
    if "stages" not in tree.held:
        return [("", convert(Stage, _linked(whole(tree, report), {}, report), "", report))]
    for name in tree.held:
        origin = tree.keys.get(name, tree.origin)
        if name in SHARED:
            fix = f"write defaults.{name}, or stages.NAME.{name}"
            report.add("is not for the pipeline to say", fix, name, origin)
        elif name not in TOP:
            unknown(name, name, TOP, origin, report)
    listed = tree.held["stages"]
    if not isinstance(listed.held, list) or not listed.held:
        report.add("is not a list of stages", "write `- name: ...` items", "stages", listed.origin)
        return []
    out = _out(tree, report)
    defaults = _defaults(tree, report)
    stages: list[tuple[str, Any]] = []
    folders: dict[str, Value] = {}
    for index, item in enumerate(listed.held):
        name = _name(item, f"stages.{index}", folders, report)
        if name:
            stages.append((name, _stage(name, item, defaults, out, folders, report)))
    _check_merges(stages, tree, report)
    _check_aside(stages, tree, report)
    return stages


def _check_merges(stages: Sequence[tuple[str, Any]], tree: Value, report: Report) -> None:
    """What an earlier stage trains can be folded, where a later one is to fold it."""
    trained = {node.out: node.adapter.limits.merge for _, node in stages if isinstance(node, Training)}
    for name, node in stages:
        if isinstance(node, Merge) and (reason := trained.get(node.model.name)):
            key = f"stages.{name}.model"
            fix = "drop the stage, or train lora"
            report.add(f"cannot be merged: {reason}", fix, key, report.origins.get(key, tree.origin))


def _check_aside(stages: Sequence[tuple[str, Any]], tree: Value, report: Report) -> None:
    """All stages that train are run by the same ranks."""
    aside = {name: node.aside for name, node in stages if isinstance(node, Training)}
    for name in (name for name, count in aside.items() if count and len({*aside.values()}) > 1):
        key = f"stages.{name}.rollout.ranks"
        what = "the ranks of all stages that train are the same, and not in all of them do as many only draw"
        fix = "run this stage by a recipe of its own, or set rollout.ranks=0"
        report.add(what, fix, key, report.origins.get(key, tree.origin))


def _out(tree: Value, report: Report) -> Value:
    """The folder above the stages' own."""
    if "out" not in tree.held:
        report.add("is missing", "add out: the folder of the stages' folders", "out", tree.origin)
        return Value("", tree.origin)
    out: Value = tree.held["out"]
    made = convert(str, out, "out", report)
    return replace(out, held=made if isinstance(made, str) else "")


def _defaults(tree: Value, report: Report) -> Value:
    """What the stages share; a key that no kind has is an error once, not in each stage."""
    said: Value = tree.held.get("defaults", Value({}))
    if not isinstance(said.held, dict):
        report.add("is not a mapping", "write `key: value` lines below it", "defaults", said.origin)
        return Value({})
    for name in said.held:
        origin = said.keys.get(name, said.origin)
        if name == "out":
            report.add("is not for defaults to say", "set out at the top", "defaults.out", origin)
        elif name not in SHARED:
            unknown(name, f"defaults.{name}", SHARED, origin, report)
    return replace(said, held={name: value for name, value in said.held.items() if name in SHARED})


def _name(item: Value, key: str, folders: Mapping[str, Value], report: Report) -> str:
    """The stage's own name, or nothing."""
    name = item.held.get("name") if isinstance(item.held, dict) else None
    if name is None or not isinstance(name.held, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name.held):
        origin = item.origin if name is None else name.origin
        report.add("has no plain name", "add name: letters, digits, - and _", key, origin)
        return ""
    if name.held in folders:
        report.add(f"a second stage is called {name.held}", "give each its own name", f"{key}.name", name.origin)
        return ""
    report.origins[f"stages.{name.held}.name"] = name.origin
    return str(name.held)


def _stage(name: str, item: Value, defaults: Value, out: Value, folders: dict[str, Value], report: Report) -> Any:
    """One stage: its own keys over those defaults that its kind has; its folder joins `folders`."""
    key, folder = f"stages.{name}", _below(out, name)
    own = {key: value for key, value in item.held.items() if key != "name"}
    if "out" in own:
        fix = f"take it away: the folder is {folder.origin.written or folder.held}"
        report.add("is not for a stage to say", fix, f"{key}.out", item.keys["out"])
    cls = KINDS.get(full(str(own.get("kind", defaults.held.get("kind", Value(""))).held)))
    known = {field.name for field in dataclasses.fields(cls)} if cls is not None else set()
    shared = {
        key: value for key, value in defaults.held.items() if key in known and (key != "kind" or "kind" not in own)
    }
    body = whole(merge(replace(defaults, held=shared), replace(item, held=own)), report, key)
    body = _linked(body, folders, report, key)
    folders[name] = folder
    return convert(Stage, replace(body, held={**body.held, "out": folder}), key, report)


def _below(out: Value, name: str) -> Value:
    """A stage's folder; it shows what was written where the folder above came from the environment."""
    written = f"{out.origin.written}/{name}" if out.origin.written else ""
    return Value(str(Path(out.held) / name), replace(out.origin, written=written))


def each_text(tree: Value, change: Callable[[Value, str], Value], key: str = "") -> Value:
    """The tree with `change(value, dotted key)` in place of every text in it."""
    if isinstance(tree.held, dict):
        held = {name: each_text(value, change, under(key, name)) for name, value in tree.held.items()}
        return replace(tree, held=held, bare=each_text(tree.bare, change, key) if tree.bare is not None else None)
    if isinstance(tree.held, list):
        return replace(tree, held=[each_text(value, change, under(key, str(i))) for i, value in enumerate(tree.held)])
    return change(tree, key) if isinstance(tree.held, str) else tree


def _linked(tree: Value, folders: Mapping[str, Value], report: Report, top: str = "") -> Value:
    """The tree with each `${stages.NAME}`, alone or before the name of a file in it, turned into an earlier stage's
    folder."""

    def link(value: Value, key: str) -> Value:
        written = re.sub(ENV, "", value.origin.written or value.held)
        match = re.fullmatch(r"\$\{stages\.([^}]*)\}((?:/[\w-][\w.-]*)*)", written)
        if match is not None and match[1] in folders:
            folder = folders[match[1]]
            above = folder.origin.written
            return Value(folder.held + match[2], replace(value.origin, written=above and above + match[2]))
        if match is not None:
            fix = f"use one of the earlier stages ({', '.join(folders) or 'none: it is the first'})"
            report.add(f"no earlier stage is called {match[1]}", fix, key, value.origin)
        elif "${" in written:
            fix = "write ${env:NAME}, or ${stages.NAME} alone or before /FILE"
            report.add(f"{written[:60]} refers to nothing", fix, key, value.origin)
        return value

    return each_text(tree, link, top)
