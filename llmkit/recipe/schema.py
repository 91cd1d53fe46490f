"""The JSON schema (draft 2020-12) of recipes, for editors, read from the dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from llmkit.core.config import Limits, needed
from llmkit.core.hints import hints, kind_of, marks, options
from llmkit.recipe.describe import docs
from llmkit.recipe.kinds import KINDS, SHORT
from llmkit.recipe.pipeline import SHARED

Made = dict[str, Any]
ENV: Made = {"$ref": "#/$defs/env"}
FILES: Made = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
WORDS = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
BOUNDS = {"above": "exclusiveMinimum", "least": "minimum", "most": "maximum", "below": "exclusiveMaximum"}


def schema() -> Made:
    """One stage, or a pipeline of them; `extends` may bring what is required."""
    made: Made = {"env": {"type": "string", "pattern": r"^\$\{env:[^}]*\}$"}}
    alone = [_alone(cls, made) for cls in KINDS.values()]
    in_line = [{**_ref(cls, made), "properties": {"extends": False, "out": False}} for cls in KINDS.values()]
    pipeline = {
        "type": "object",
        "properties": {
            "extends": FILES,
            "out": {"type": "string", "description": "The folder of the stages' folders."},
            "defaults": {"type": "object", "propertyNames": {"enum": SHARED}},
            "stages": {"type": "array", "minItems": 1, "items": {"anyOf": in_line, "required": ["name"]}},
        },
        "required": ["stages"],
        "anyOf": [{"required": ["extends"]}, {"required": ["out"]}],
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llmkit recipe",
        "anyOf": [*alone, pipeline],
        "$defs": made,
    }


def _alone(cls: Any, made: Made) -> Made:
    """A stage at the top level."""
    ways = [{"required": ["extends"]}, {"required": ["kind", *_needed(cls)]}]
    return {**_ref(cls, made), "properties": {"name": False}, "anyOf": ways}


def _needed(cls: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(cls) if needed(item)]


def _ref(cls: Any, made: Made) -> Made:
    """A reference to a class, whose own schema joins `made`."""
    if cls.__name__ not in made:
        made[cls.__name__] = {}  # there before its fields are read
        made[cls.__name__] = _object(cls, made)
    return {"$ref": f"#/$defs/{cls.__name__}"}


def _object(cls: Any, made: Made) -> Made:
    properties = {item.name: _field(cls, item, made) for item in dataclasses.fields(cls)}
    stage = cls in KINDS.values()
    if stage:
        properties |= _short(cls, made) | {"name": {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"}, "extends": FILES}
    return {
        "type": "object",
        "description": " ".join((inspect.getdoc(cls) or "").split()),
        "properties": properties,
        "required": [] if stage else _needed(cls),
        "additionalProperties": False,
    }


def _short(cls: Any, made: Made) -> Made:
    """What a stage's keys may be where its kind is the name of a loss."""
    names = [name for name, stage in SHORT.items() if stage is cls]
    if not names:
        return {}
    hint = hints(cls)["loss"]
    losses = [_ref(loss, made) for loss in options(hint)]
    text = {"description": docs(cls)["loss"]}
    return {"kind": {"enum": [kind_of(cls), *names]}, "loss": {"anyOf": [_schema(hint, made), *losses], **text}}


def _field(cls: Any, item: dataclasses.Field[Any], made: Made) -> Made:
    hint = hints(cls)[item.name]
    entry = {"const": item.default} if item.metadata.get("later") else _schema(hint, made, item.default)
    limits: Limits = item.metadata.get("limits", Limits())
    entry = {**entry, **{BOUNDS[name]: bound for name, bound in vars(limits).items() if bound is not None}}
    if text := docs(cls).get(item.name):
        entry["description"] = text
    if isinstance(item.default, bool | int | float | str):
        entry["default"] = item.default
    return entry


def _schema(hint: Any, made: Made, default: Any = None) -> Made:
    """The schema of a type: any of its members, and text with a unit or from the environment where it is a number."""
    members = options(hint)
    nodes = [option for option in members if dataclasses.is_dataclass(option)]
    untagged = nodes if len(nodes) == 1 else [type(default)]
    found = [entry for option in members for entry in _member(option, option not in untagged, made)]
    if marks(hint)[1]:
        found.append({"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?\s*[A-Za-z]+$"})
    fixed = len(members) == 1 and len(get_args(members[0])) == 1 and get_origin(members[0]) is Literal
    if not fixed and not nodes and {"type": "string"} not in found and found != [{"type": "null"}]:
        found.append(ENV)
    return found[0] if len(found) == 1 else {"anyOf": found}


def _member(hint: Any, tagged: bool, made: Made) -> list[Made]:
    """The ways to write one member of a union; a node among others must say its kind, unless it is the default's."""
    origin, given = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _node(hint, tagged, made)
    if origin is Literal:
        return [{"const": given[0]} if len(given) == 1 else {"enum": list(given)}]
    if origin is tuple:
        return [{"type": "array", "items": _schema(given[0], made)}]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return [{"type": "object", "additionalProperties": _schema(given[1], made)}]
    return [{"type": WORDS[hint]}]


def _node(cls: Any, tagged: bool, made: Made) -> list[Made]:
    ways: list[Made] = [{**_ref(cls, made), "required": ["kind"]} if tagged else _ref(cls, made)]
    if kind := kind_of(cls):
        ways.append({"const": kind})
    if short := getattr(cls, "_short", None):
        ways.append(_schema(hints(cls)[short], made))
    if keyed := getattr(cls, "_keyed", None):
        ways.append(_keyed(cls, keyed, made))
    return ways


def _keyed(cls: Any, name: str, made: Made) -> Made:
    """The node with its kind in the place of the key `name`."""
    kind, items = kind_of(cls), [item for item in dataclasses.fields(cls) if item.name != "kind"]
    keys = {item.name: kind if item.name == name else item.name for item in items}
    properties = {keys[item.name]: _field(cls, item, made) for item in items}
    required = {kind: None} | {keys[item.name]: None for item in items if needed(item)}
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}
