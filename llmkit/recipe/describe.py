"""What the dataclasses say of themselves: the line under each field, and tables for the docs."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from llmkit.core.config import Later, Unit
from llmkit.core.hints import hints, kind_of
from llmkit.core.wording import yaml_word


@cache
def docs(cls: Any) -> dict[str, str]:
    """The line under each field of a node's source, and of the sources of the nodes that it derives from."""
    found = {name: text for base in reversed(cls.__mro__[1:-1]) for name, text in docs(base).items()}
    body = ast.parse(inspect.getsource(cls)).body[0]
    previous = ""
    for statement in body.body if isinstance(body, ast.ClassDef) else []:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            previous = statement.target.id
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and previous:
            found[previous] = " ".join(str(statement.value.value).split())
        else:
            previous = ""
    return found


def markdown(cls: Any) -> str:
    """The page of one recipe kind: what it does, and a table for it and for each node in it."""
    head = [
        f"# `kind: {kind_of(cls)}`",
        "",
        inspect.getdoc(cls) or "",
        "",
        "Generated from the dataclasses by `make docs`.",
    ]
    return "\n".join([*head, "", tables(cls, titled=False)])


def tables(*classes: Any, titled: bool = True, of: str = "llmkit") -> str:
    """A table for each of some nodes and for each node in them that a package `of` ours defines; the first one's own
    title may be left out."""
    seen: list[Any] = []
    for cls in classes:
        _collect(cls, seen)
    parts: list[str] = []
    for node in (node for node in seen if node.__module__.startswith(of)):
        name = f"`{kind_of(node)}`" if kind_of(node) else node.__name__
        if titled or node is not classes[0]:
            parts += [f"## {name}", "", inspect.getdoc(node) or "", ""]
        parts += ["| key | type | default | meaning |", "|---|---|---|---|"]
        parts += [_line(node, item) for item in dataclasses.fields(node)] + [""]
    return "\n".join(parts)


def _line(cls: Any, item: Any) -> str:
    hint = hints(cls)[item.name]
    if item.default_factory is not dataclasses.MISSING:
        default = "`{}`"
    elif item.default is dataclasses.MISSING:
        default = "required"
    elif dataclasses.is_dataclass(item.default):
        default = f"`{kind_of(type(item.default)) or 'as below'}`"
    else:
        default = f"`{yaml_word(item.default)}`"
    meaning = docs(cls).get(item.name, "")
    if item.metadata.get("later"):
        meaning = f"{meaning} *Not available yet.*".strip()
    text = _type(hint).replace("|", "\\|")
    return f"| `{item.name}` | {text} | {default} | {meaning} |"


def _type(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        later = [name for mark in get_args(hint)[1:] if isinstance(mark, Later) for name in mark.names]
        unit = [mark.name for mark in get_args(hint)[1:] if isinstance(mark, Unit)]
        text = unit[0] if unit else _type(get_args(hint)[0])
        return f"{text} (later: {', '.join(later)})" if later and len(later) < 12 else text
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_type(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " | ".join(f"`{name}`" for name in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_type(get_args(hint)[0])}"
    if get_origin(hint) is not None:
        return "mapping"
    if dataclasses.is_dataclass(hint):
        return f"`{kind_of(hint)}`" if kind_of(hint) else str(getattr(hint, "__name__", hint))
    return {bool: "bool", int: "int", float: "float", str: "text", type(None): "null"}.get(hint, str(hint))


def _collect(cls: Any, seen: list[Any]) -> None:
    if cls in seen:
        return
    seen.append(cls)
    for hint in hints(cls).values():
        for node in _nodes(hint):
            _collect(node, seen)


def _nodes(hint: Any) -> list[Any]:
    if get_origin(hint) is Annotated:
        return _nodes(get_args(hint)[0])
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [node for part in get_args(hint) for node in _nodes(part)]
