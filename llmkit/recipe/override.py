"""`key.path=value`: what a command line, or a call in Python, puts over a recipe's tree."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.core.convert import wrapped
from llmkit.core.errors import RecipeError
from llmkit.core.scalars import Origin, Value
from llmkit.core.wording import Report
from llmkit.recipe.extend import merge
from llmkit.recipe.parse import parse

COMMAND = Origin("command line")
KEY = r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*"


def overridden(tree: Value, given: Mapping[str, Any] | Sequence[str], report: Report) -> Value:
    """The tree with each override in its place; those that cannot be placed go into the report."""
    pairs = given.items() if isinstance(given, Mapping) else [(text, None) for text in given]
    for text, value in pairs:
        key, found, written = text.partition("=")
        if isinstance(given, Mapping):
            made: Value | None = wrapped(value)
            found, key = "=", text
        else:
            made = _read(key, written, report)
        if not found or not re.fullmatch(KEY, key):
            report.add(f"{text!r} is no override", "write key.path=value", "", COMMAND)
        elif key.startswith("stages.") and "stages" not in tree.held:
            report.add("the recipe has no stages", "address its own keys", key, COMMAND)
        elif made is not None:
            tree = _put(tree, key.split("."), made, key, report)
    return tree


def _read(key: str, text: str, report: Report) -> Value | None:
    """The value of an override, read as YAML."""
    if not text.strip():
        return Value("", COMMAND, quoted=False)
    try:
        return parse(text, "", report, "command line")
    except RecipeError as cause:
        what = cause.problems[0].what
        report.add(f"{text!r} cannot be read ({what})", "quote it, for YAML and for the shell", key, COMMAND)
        return None


def _put(tree: Value, path: Sequence[str], value: Value, key: str, report: Report) -> Value:
    """`tree` with `value` at `path`; a list takes an index, or the name of an item that has one."""
    if not path:
        return merge(tree, value, key)
    first, rest = path[0], path[1:]
    if isinstance(tree.held, list):
        index = _index(tree.held, first, key, report)
        held = [_put(v, rest, value, key, report) if i == index else v for i, v in enumerate(tree.held)]
        return replace(tree, held=held)
    if not isinstance(tree.held, dict):
        tree = Value({}, COMMAND, bare=None if tree.is_null else tree)
    inner = tree.held.get(first, Value({} if rest else None, COMMAND))
    keys = tree.keys if first in tree.keys else {**tree.keys, first: COMMAND}
    return replace(tree, held={**tree.held, first: _put(inner, rest, value, key, report)}, keys=keys)


def _index(items: Sequence[Value], asked: str, key: str, report: Report) -> int:
    """Which item `asked` names, or -1."""
    named = [item.held.get("name", Value(None)).held if isinstance(item.held, dict) else None for item in items]
    if asked in named:
        return named.index(asked)
    if asked.isdecimal() and int(asked) < len(items):
        return int(asked)
    known = [str(name) for name in named if name is not None] or [str(index) for index in range(len(items))]
    report.add(f"there is no {asked}", f"use one of {', '.join(known)}", key, COMMAND)
    return -1
