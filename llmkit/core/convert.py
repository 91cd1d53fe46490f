"""From written values to typed ones, by the type of each field, with all that is wrong told at once.

A recipe file, a command line and a Python call meet here: each gives a tree of `Value`s that know where they were
written; `convert` follows the type hints of the nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, Literal, get_args, get_origin

from llmkit.core.config import Conflict, Limits, needed
from llmkit.core.hints import hints, kind_of, kinds, marks, names, options
from llmkit.core.scalars import BAD, EMPTY, Origin, Value, measured, read_bool, read_float, read_int, read_str
from llmkit.core.wording import LATER, Report, no_kind, text_of, unknown, way_out


def check_fields(node: Any) -> None:
    """Checks a node built in Python, and puts converted values in their fields.

    Raises:
        RecipeError: with every problem of the node.
    """
    report, cls = Report(), type(node)
    bad = set()
    for item in dataclasses.fields(node):
        value = convert(hints(cls)[item.name], wrapped(getattr(node, item.name)), item.name, report, item)
        object.__setattr__(node, item.name, value) if value is not BAD else bad.add(item.name)
    if not bad:
        cross_check(node, "", Origin(), bad, report)
    report.stop_if_bad()


def check_names(cls: Any, given: Mapping[str, Any]) -> None:
    """What a node is built with in Python, where a name of it is none of its fields, or one that it needs is missing.

    Raises:
        RecipeError: with every problem, those of the values too.
    """
    report = Report()
    build(cls, wrapped(given), "", report)
    report.stop_if_bad()


def wrapped(given: Any, origin: Origin = Origin()) -> Value:
    """A Python value as a tree of `Value`s."""
    if isinstance(given, Value):
        return given
    if isinstance(given, PurePath):
        return Value(str(given), origin)
    if isinstance(given, list | tuple):
        return Value([wrapped(item, origin) for item in given], origin)
    if isinstance(given, Mapping):
        held = {str(key): wrapped(item, origin) for key, item in given.items()}
        return Value(held, origin, keys=dict.fromkeys(held, origin))
    return Value(given, origin)


def convert(hint: Any, value: Value, key: str, report: Report, item: dataclasses.Field[Any] | None = None) -> Any:
    """The typed value of what was written, or the mark `BAD`; problems go into the report.

    `key` is the dotted path of the value, `item` the field that it is for.
    """
    report.origins[key] = value.origin
    if item is not None and item.metadata.get("later"):
        made = _convert(hint, value, key, Report())
        if made is not BAD and made == item.default:
            return made
        report.add(LATER, "leave it out", key, value.origin)
        return BAD
    made = _convert(hint, value, key, report, item)
    if made == "" and (item is None or item.default != ""):
        report.add(EMPTY, way_out(hint, value), key, value.origin)
        return BAD
    limits: Limits | None = item.metadata.get("limits") if item is not None else None
    if limits and isinstance(made, int | float) and not isinstance(made, bool) and (bound := limits.broken_by(made)):
        report.add(f"{text_of(value)} is out of range", f"give a value {bound}", key, value.origin)
        return BAD
    return made


def _convert(hint: Any, value: Value, key: str, report: Report, item: dataclasses.Field[Any] | None = None) -> Any:
    later, unit = marks(hint)
    members = options(hint)
    nodes = [option for option in members if dataclasses.is_dataclass(option)]
    words = any(get_origin(option) is Literal for option in members)  # a bare word is one of them, not a node
    written = dict if words else dict | str
    if nodes and (isinstance(value.held, written) or dataclasses.is_dataclass(value.held)):
        return _node(nodes, members, value, key, report, later, item.default if item is not None else None)
    if isinstance(value.held, str) and value.held in later:
        report.add(f"{value.held} {LATER}", f"use {names(hint)}", key, value.origin)
        return BAD
    problems: list[str] = []
    before = len(report.problems)
    for option in members:
        made = _scalar(option, value, unit, key, report, problems)
        if made is not BAD:
            return made
    if len(report.problems) == before:  # what is wrong inside a list was told at its item
        what = problems[0] if problems else f"{text_of(value)} is not {names(hint)}"
        spare = value.held is None and item is not None and not needed(item)
        report.add(what, "leave it out" if spare else way_out(hint, value), key, value.origin)
    return BAD


def _scalar(option: Any, value: Value, unit: str, key: str, report: Report, problems: list[str]) -> Any:
    """One member of a union, or the mark; `problems` gets what to say about it."""
    held, origin = value.held, get_origin(option)
    if origin is Literal:
        match = [name for name in get_args(option) if held == name and type(held) is type(name)]
        return match[0] if match else BAD
    if origin is tuple:
        return _items(get_args(option)[0], value, key, report)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(get_args(option), value, key, report)
    if option is type(None):
        return None if value.is_null else BAD
    if unit and option is {"duration": float, "bytes": int}[unit] and isinstance(held, str):
        made = measured(held, unit)
        if made is not None:
            return option(made)
    reader = {bool: read_bool, int: read_int, float: read_float, str: read_str}.get(option)
    return BAD if reader is None else reader(value, problems)


def _items(hint: Any, value: Value, key: str, report: Report) -> Any:
    if not isinstance(value.held, list | tuple):
        return BAD
    made = [convert(hint, wrapped(item), f"{key}.{index}", report) for index, item in enumerate(value.held)]
    return BAD if any(item is BAD for item in made) else tuple(made)


def _mapping(given: tuple[Any, ...], value: Value, key: str, report: Report) -> Any:
    """A mapping whose names are texts, or whole numbers."""
    key_hint, hint = given
    if not isinstance(value.held, Mapping):
        return BAD
    made = {}
    for name, item in value.held.items():
        here = f"{key}.{name}"
        named = (
            convert(int, dataclasses.replace(wrapped(name), quoted=False), here, report) if key_hint is int else name
        )
        made[named] = convert(hint, wrapped(item), here, report)
    return BAD if BAD in made or any(item is BAD for item in made.values()) else made


def _node(
    nodes: list[Any], members: list[Any], value: Value, key: str, report: Report, later: tuple[str, ...], default: Any
) -> Any:
    if type(value.held) in nodes:
        return value.held
    if isinstance(value.held, str):
        return _short(nodes, members, value, key, report, later)
    if not isinstance(value.held, dict):
        report.add(f"{type(value.held).__name__} is not {kinds(nodes)}", "give one of those", key, value.origin)
        return BAD
    value = spelled(nodes, _unfolded(nodes, value))
    cls = _by_kind(nodes, value, key, report, later) if "kind" in value.held else _by_keys(nodes, value, default)
    if cls is None:
        fit = [node for node in nodes if _has(node, value)]
        report.add("is missing", f"add kind: {kinds(fit or nodes)}", under(key, "kind"), value.origin)
        return BAD
    return cls if cls is BAD else build(cls, value, key, report)


def _unfolded(nodes: list[Any], value: Value) -> Value:
    """A mapping that lies over a bare word, with the word under the key that it is short for."""
    if value.bare is None:
        return value
    short = next((node._short for node in nodes if hasattr(node, "_short")), "kind")
    held = {short: value.bare, **value.held}
    return dataclasses.replace(value, held=held, keys={short: value.bare.origin, **value.keys}, bare=None)


def spelled(nodes: list[Any], value: Value) -> Value:
    """A mapping that has a kind for a key, with the kind and the field that the key is short for."""
    for node in nodes:
        kind, name = kind_of(node), getattr(node, "_keyed", "")
        if name and kind in value.held and not {"kind", name} & set(value.held):
            origin, rest = value.keys.get(kind, value.origin), {k: v for k, v in value.held.items() if k != kind}
            said = {} if wrapped(value.held[kind]).is_null else {name: value.held[kind]}
            held = {"kind": Value(kind, origin), **said, **rest}
            return dataclasses.replace(value, held=held, keys={**value.keys, "kind": origin, name: origin})
    return value


def _short(nodes: list[Any], members: list[Any], value: Value, key: str, report: Report, later: tuple[str, ...]) -> Any:
    """A bare word where a node may stand: a kind, or the value of the field that the node's `_short` names."""
    for node in nodes:
        if value.held and kind_of(node) == value.held:
            return build(node, Value({}, value.origin), key, report)
        if short := getattr(node, "_short", None):
            return build(node, Value({short: value}, value.origin, keys={short: value.origin}), key, report)
    if type(None) in members and value.is_null:
        return None
    if kind_of(nodes[0]) and not value.is_null:
        no_kind(nodes, value, key, _union(key), report, later)
        return BAD
    first = f"kind: {kind_of(nodes[0])}" if kind_of(nodes[0]) else f"{dataclasses.fields(nodes[0])[0].name}: ..."
    report.add(f"{text_of(value)} is not a mapping", f"write `{{{first}}}`", key, value.origin)
    return BAD


def _by_keys(nodes: list[Any], value: Value, default: Any) -> Any:
    """The class of a mapping that says no kind: the only one, or the default's unless its keys are another's alone."""
    if len(nodes) == 1:
        return nodes[0]
    own = type(default)
    return own if own in nodes and (_has(own, value) or not any(_has(node, value) for node in nodes)) else None


def _has(node: Any, value: Value) -> bool:
    """Whether a node knows every key of a mapping."""
    return set(value.held) <= {item.name for item in dataclasses.fields(node)}


def _by_kind(nodes: list[Any], value: Value, key: str, report: Report, later: tuple[str, ...]) -> Any:
    path, written = under(key, "kind"), wrapped(value.held["kind"])
    for node in nodes:
        if written.held and kind_of(node) == written.held:
            return node
    if not any(map(kind_of, nodes)):
        unknown("kind", path, [item.name for item in dataclasses.fields(nodes[0])], written.origin, report)
        return BAD
    no_kind(nodes, written, path, _union(key), report, later)
    return BAD


def _union(key: str) -> str:
    """What a union is called in an error: the last word of its key (`log.2` -> log), or `stage`."""
    words = [word for word in key.split(".") if not word.isdecimal()]
    return "stage" if not words or (words[0] == "stages" and len(words) <= 2) else words[-1]


def build(cls: Any, value: Value, key: str, report: Report) -> Any:
    """A node of class `cls` from a mapping, or the mark."""
    items = {item.name: item for item in dataclasses.fields(cls)}
    made: dict[str, Any] = {}
    before = len(report.problems)
    for name, given in value.held.items():
        path, written = under(key, name), wrapped(given)
        if name in items:
            made[name] = convert(hints(cls)[name], written, path, report, items[name])
        else:
            unknown(name, path, list(items), value.keys.get(name, written.origin), report)
    bad = {name for name, item in made.items() if item is BAD}
    for name, item in items.items():
        if name not in made:
            report.origins[under(key, name)] = Origin("default")
        if name not in made and needed(item):
            report.add("is missing", f"add {name}", under(key, name), value.origin)
    if not any(needed(item) and made.get(name, BAD) is BAD for name, item in items.items()):
        node = _filled(cls, {name: item for name, item in made.items() if item is not BAD})
        cross_check(node, key, value.origin, bad, report)
        if len(report.problems) == before:
            return node
    return BAD


def under(key: str, name: str) -> str:
    """The dotted path of a key below another."""
    return f"{key}.{name}" if key else name


def _filled(cls: Any, made: Mapping[str, Any]) -> Any:
    """A node with checked values, and defaults for the rest; not through `__init__`, which would check them again."""
    node = object.__new__(cls)
    for item in dataclasses.fields(cls):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        object.__setattr__(node, item.name, made.get(item.name, default))
    return node


def cross_check(node: Any, key: str, origin: Origin, bad: Iterable[str], report: Report) -> None:
    """The node's own rules over several fields; those that speak of a `bad` field, told already, are passed over."""
    found: Iterable[Conflict] = node.problems() if hasattr(node, "problems") else ()
    for conflict in found:
        if {conflict.key.partition(".")[0], conflict.other.partition(".")[0]} & set(bad):
            continue
        what, path = conflict.what, under(key, conflict.key)
        written = _nearest(path, key, report)
        place = written if written and written.kind != "default" else origin
        if conflict.other:
            other = under(key, conflict.other)
            what = f"contradicts {other}{_place(_nearest(other, key, report), place)}: {what}"
        report.add(what, conflict.fix, path, place)


def _nearest(path: str, top: str, report: Report) -> Origin | None:
    """The origin of a key, or of the nearest mapping around it, below `top`, that was written."""
    first = found = report.origins.get(path)
    while (found is None or found.kind == "default") and "." in path and path.rpartition(".")[0] != top:
        path = path.rpartition(".")[0]
        found = report.origins.get(path)
    return first if found is None else found


def _place(origin: Origin | None, beside: Origin) -> str:
    """Where a second key was written, as an error at `beside` says it."""
    if origin is None or origin.kind == "python":
        return ""
    return f" (line {origin.line})" if origin.kind == "file" and origin.file == beside.file else f" ({origin})"
