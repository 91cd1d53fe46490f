"""From written values to typed ones, by the type of each field, with all that is wrong told at once.

A recipe file, a command line and a Python call meet here: each gives a tree of `Value`s that know where they were
written; `convert` follows the type hints of the nodes.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from llmkit.core.config import Later, Limits, Unit
from llmkit.core.errors import Problem, RecipeError
from llmkit.core.scalars import (
    BAD,
    measured,
    read_bool,
    read_float,
    read_int,
    read_str,
)
from llmkit.core.scalars import (
    Origin as Origin,
)
from llmkit.core.scalars import (
    Value as Value,
)


@dataclass
class Report:
    """What was found on the way: problems, and the origin of each value by its dotted key."""

    problems: list[Problem] = field(default_factory=list)
    origins: dict[str, Origin] = field(default_factory=dict)

    def add(self, what: str, fix: str, key: str, origin: Origin) -> None:
        """One problem."""
        self.problems.append(Problem(what, fix, origin.file, origin.line, origin.column, key))


def hints(cls: Any) -> dict[str, Any]:
    """The resolved type of each field."""
    return _hints(cls)


@cache
def _hints(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cast(Any, cls), include_extras=True)


def check_fields(node: Any) -> None:
    """Checks a node built in Python, and puts converted values in their fields.

    Raises:
        RecipeError: with every problem of the node.
    """
    report, cls = Report(), type(node)
    for item in dataclasses.fields(node):
        value = convert(hints(cls)[item.name], _wrap(getattr(node, item.name)), item.name, report, item)
        if value is not BAD:
            object.__setattr__(node, item.name, value)
    if not report.problems:
        cross_check(node, "", Value({}), report)
    if report.problems:
        raise RecipeError(problems=report.problems)


def _wrap(given: Any) -> Value:
    if isinstance(given, Value):
        return given
    if isinstance(given, PurePath):
        return Value(str(given))
    if isinstance(given, list | tuple):
        return Value([_wrap(item) for item in given])
    if isinstance(given, Mapping):
        return Value({str(key): _wrap(item) for key, item in given.items()})
    return Value(given)


def convert(hint: Any, value: Value, key: str, report: Report, item: dataclasses.Field[Any] | None = None) -> Any:
    """The typed value of what was written, or a mark that it could not be made; problems go into the report."""
    report.origins[key] = value.origin
    if item is not None and item.metadata.get("later") and not _is_default(item, value):
        report.add("is not available yet in this version", "leave it out", key, value.origin)
        return BAD
    made = _convert(hint, value, key, report)
    limits: Limits | None = item.metadata.get("limits") if item is not None else None
    if limits and isinstance(made, int | float) and not isinstance(made, bool) and (bound := limits.broken_by(made)):
        report.add(f"{_text(value)} is out of range", f"give a value {bound}", key, value.origin)
        return BAD
    return made


def _is_default(item: dataclasses.Field[Any], value: Value) -> bool:
    default = item.default
    held = value.held
    return held == default or (
        isinstance(held, str) and held in (str(default).lower(), "null", "~") and not value.quoted
    )


def _convert(hint: Any, value: Value, key: str, report: Report) -> Any:
    later, unit = _marks(hint)
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    options = _options(hint)
    nodes = [option for option in options if dataclasses.is_dataclass(option)]
    if nodes and (isinstance(value.held, dict | str) or dataclasses.is_dataclass(value.held)):
        return _node(nodes, options, value, key, report, later)
    if isinstance(value.held, str) and value.held in later:
        report.add(f"{value.held} is not available yet in this version", f"use {_names(hint)}", key, value.origin)
        return BAD
    problems: list[str] = []
    for option in options:
        made = _scalar(option, value, unit, key, report, problems)
        if made is not BAD:
            return made
    if problems != [""]:
        hint_text = next((p for p in problems if p), "")
        report.add(hint_text or f"{_text(value)} is not {_names(hint)}", _way_out(hint, value), key, value.origin)
    return BAD


def _marks(hint: Any) -> tuple[tuple[str, ...], str]:
    """Names that come later, and the unit, of an annotated type and of the members of a union."""
    later: tuple[str, ...] = ()
    unit = ""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        later, unit = _marks(inner)
        for mark in marks:
            later += mark.names if isinstance(mark, Later) else ()
            unit = mark.name if isinstance(mark, Unit) else unit
    elif get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            more, inner_unit = _marks(option)
            later, unit = later + more, unit or inner_unit
    return later, unit


def _options(hint: Any) -> list[Any]:
    """The members of a union, flat."""
    if get_origin(hint) is Annotated:
        return _options(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) for option in _options(part)]
    return [hint]


def _scalar(option: Any, value: Value, unit: str, key: str, report: Report, problems: list[str]) -> Any:
    """One member of a union, or the mark; `problems` gets what to say about it."""
    held, origin = value.held, get_origin(option)
    if origin is Literal:
        match = [name for name in get_args(option) if held == name and type(held) is type(name)]
        return match[0] if match else BAD
    if origin is tuple or option is tuple:
        return _items(get_args(option)[0], value, key, report, problems)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(get_args(option)[1], value, key, report, problems)
    if option is type(None):
        return None if held is None or (held in ("null", "~", "") and not value.quoted) else BAD
    if option is Any:
        return held
    reader = {bool: read_bool, int: read_int, float: read_float, str: read_str}.get(option)
    if reader is None or isinstance(held, dict | list):
        return BAD
    if unit and option is {"duration": float, "bytes": int}[unit] and isinstance(held, str):
        made = measured(held, unit)
        if made is not None:
            return option(made)
    return reader(value, problems)


def _items(hint: Any, value: Value, key: str, report: Report, problems: list[str]) -> Any:
    if not isinstance(value.held, list | tuple):
        return BAD
    made = [convert(hint, _wrap(item), f"{key}.{index}", report) for index, item in enumerate(value.held)]
    if any(item is BAD for item in made):
        problems[:] = [""]  # told already, at the item
        return BAD
    return tuple(made)


def _mapping(hint: Any, value: Value, key: str, report: Report, problems: list[str]) -> Any:
    if not isinstance(value.held, Mapping):
        return BAD
    made = {name: convert(hint, _wrap(item), f"{key}.{name}", report) for name, item in value.held.items()}
    if any(item is BAD for item in made.values()):
        problems[:] = [""]
        return BAD
    return made


def _node(nodes: list[Any], options: list[Any], value: Value, key: str, report: Report, later: tuple[str, ...]) -> Any:
    held = value.held
    if type(held) in nodes:
        return held
    if isinstance(held, str):
        return _short(nodes, options, value, key, report, later)
    if not isinstance(held, dict):
        report.add(f"{type(held).__name__} is not one of {_classes(nodes)}", "give one of those", key, value.origin)
        return BAD
    cls = nodes[0] if len(nodes) == 1 and "kind" not in held else _by_kind(nodes, value, key, report, later)
    return cls if cls is BAD else build(cls, value, key, report)


def _short(nodes: list[Any], options: list[Any], value: Value, key: str, report: Report, later: tuple[str, ...]) -> Any:
    """A bare word where a node may stand: a kind, or the value of the field that the node's `_short` names."""
    for node in nodes:
        if kind_of(node) == value.held:
            return build(node, Value({}, value.origin), key, report)
        if short := getattr(node, "_short", None):
            return build(node, Value({short: value}, value.origin, keys={short: value.origin}), key, report)
    if str in options:
        problems: list[str] = []
        made = read_str(value, problems)
        if made is not BAD:
            return made
    if type(None) in options and value.held in ("null", "~", "") and not value.quoted:
        return None
    if value.held in later:
        report.add(f"{value.held} is not available yet in this version", f"use {_kinds(nodes)}", key, value.origin)
        return BAD
    report.add(f"{_text(value)} is not a mapping", f"write `{{kind: {kind_of(nodes[0]) or '...'}}}`", key, value.origin)
    return BAD


def _by_kind(nodes: list[Any], value: Value, key: str, report: Report, later: tuple[str, ...]) -> Any:
    written = value.held.get("kind")
    path = f"{key}.kind" if key else "kind"
    if written is None:
        report.add("says no kind", f"add kind: {_kinds(nodes)}", path, value.origin)
        return BAD
    name = written.held if isinstance(written, Value) else written
    origin = written.origin if isinstance(written, Value) else value.origin
    for node in nodes:
        if kind_of(node) == name:
            return node
    if name in later:
        report.add(f"{name} is not available yet in this version", f"use {_kinds(nodes)}", path, origin)
        return BAD
    near = difflib.get_close_matches(str(name), [*map(kind_of, nodes), *later], 1)
    asked = f", did you mean {near[0]}?" if near else ""
    report.add(f"{_text(_wrap(written))} is no kind of {key or 'stage'}{asked}", f"use {_kinds(nodes)}", path, origin)
    return BAD


def build(cls: Any, value: Value, key: str, report: Report) -> Any:
    """A node of class `cls` from a mapping, or the mark."""
    items = {item.name: item for item in dataclasses.fields(cls)}
    made: dict[str, Any] = {}
    before = len(report.problems)
    for name, given in value.held.items():
        path, wrapped = f"{key}.{name}" if key else name, _wrap(given)
        if name not in items:
            _unknown(name, path, list(items), value.keys.get(name, wrapped.origin), report)
            continue
        made[name] = convert(hints(cls)[name], wrapped, path, report, items[name])
    for name, item in items.items():
        path = f"{key}.{name}" if key else name
        if name not in made and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            report.add("is missing", f"add {name}", path, value.origin)
        elif name not in made:
            report.origins[path] = Origin("default")
    if len(report.problems) > before:
        return BAD
    node = object.__new__(cls)
    for name, item in items.items():
        default = item.default if item.default is not dataclasses.MISSING else None
        if name not in made and item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        object.__setattr__(node, name, made.get(name, default))
    cross_check(node, key, value, report)
    return node if len(report.problems) == before else BAD


def cross_check(node: Any, key: str, value: Value, report: Report) -> None:
    """The node's own rules over several fields; each names the place of every key that it speaks of."""
    told: Iterable[tuple[str, str, str]] = node.problems() if hasattr(node, "problems") else ()
    for name, what, fix in told:
        path = f"{key}.{name}" if key else name
        report.add(_with_places(what, key, report), fix, path, _nearest(path, report, value.origin))


def _with_places(what: str, key: str, report: Report) -> str:
    """Names the line of other keys that a contradiction speaks of: `optim.lr` -> `optim.lr (line 7)`."""

    def place(match: re.Match[str]) -> str:
        origin = report.origins.get(f"{key}.{match[0]}" if key else match[0])
        return f"{match[0]} (line {origin.line})" if origin is not None and origin.line else match[0]

    return re.sub(r"\b[a-z_]+(\.[a-z_]+)*\b(?=[ :,])", place, what)


def _nearest(path: str, report: Report, otherwise: Origin) -> Origin:
    """The origin of a key, or of the nearest mapping around it that was written."""
    while path:
        origin = report.origins.get(path)
        if origin is not None and origin.kind != "default":
            return origin
        path = path.rpartition(".")[0]
    return otherwise


def _unknown(name: str, path: str, known: list[str], origin: Origin, report: Report) -> None:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    asked = f", did you mean {near[0]}?" if near else ""
    report.add(f"unknown key{asked}", f"use one of {', '.join(known)}", path, origin)


def kind_of(node: Any) -> str:
    """The `kind` of a node's class, or nothing."""
    hint = hints(node).get("kind")
    return get_args(hint)[0] if hint is not None and get_origin(hint) is Literal else ""


def _kinds(nodes: list[Any]) -> str:
    return " | ".join(filter(None, map(kind_of, nodes))) or _classes(nodes)


def _classes(nodes: list[Any]) -> str:
    return " | ".join(node.__name__ for node in nodes)


def _names(hint: Any) -> str:
    """What a type is called in an error."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    named: list[str] = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            named += [str(name) for name in get_args(option)]
        elif dataclasses.is_dataclass(option):
            named.append(kind_of(option) or "a mapping")
        elif get_origin(option) is tuple:
            named.append("a list")
        else:
            named.append(words.get(option, "a mapping"))
    return " | ".join(dict.fromkeys(named))


def _way_out(hint: Any, value: Value) -> str:
    options = _options(hint)
    if str in options and not isinstance(value.held, dict | list):
        return "quote it"
    literals = [str(name) for option in options if get_origin(option) is Literal for name in get_args(option)]
    near = difflib.get_close_matches(str(value.held), literals, 1) if isinstance(value.held, str) else []
    if near:
        return f"did you mean {near[0]}?"
    if value.quoted and isinstance(value.held, str) and value.origin.kind == "file":
        return "take the quotes away" if {int, float, bool} & set(options) else f"use {_names(hint)}"
    return f"use {_names(hint)}"


def _text(value: Value) -> str:
    held = value.held
    if isinstance(held, dict | list):
        return "a mapping" if isinstance(held, dict) else "a list"
    text = repr(held) if isinstance(held, str) and value.quoted else str(held)
    return text if len(text) <= 60 else text[:57] + "..."
