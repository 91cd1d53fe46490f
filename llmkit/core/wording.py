"""What is wrong with a recipe, in words: collected with its place, and told at once."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from llmkit.core.elsewhere import KINDS, NAMES
from llmkit.core.errors import Problem, RecipeError
from llmkit.core.hints import hints, kind_of, kinds, names, options
from llmkit.core.scalars import Origin, Value

LATER = "is not available yet in this version"
MOST_GUESSES = 200
"""A recipe with more problems than this is no misspelt one: what its keys could have meant is not worth the time."""


@dataclass
class Report:
    """What was found on the way: problems, and the origin of each value by its dotted key."""

    problems: list[Problem] = field(default_factory=list)
    origins: dict[str, Origin] = field(default_factory=dict)

    def add(self, what: str, fix: str, key: str, origin: Origin) -> None:
        """One problem."""
        self.problems.append(Problem(what, fix, origin.file, origin.line, origin.column, key))

    def stop_if_bad(self) -> None:
        """Raises:
        RecipeError: with every problem, in the order of the file.
        """
        if self.problems:
            told = dict.fromkeys(self.problems)
            raise RecipeError(problems=sorted(told, key=lambda p: (p.file, p.line, p.column)))


def no_kind(nodes: list[Any], value: Value, path: str, union: str, report: Report, later: tuple[str, ...]) -> None:
    """Says that a kind comes later, or that there is none of that name."""
    if isinstance(value.held, str) and value.held in later:
        report.add(f"{value.held} {LATER}", f"use {kinds(nodes)}", path, value.origin)
        return
    if meant := _written_out(nodes, value):
        report.add(f"{text_of(value)} is no kind of {union}", f"write {meant}", path, value.origin)
        return
    if isinstance(value.held, str) and value.held in KINDS:
        report.add(f"{text_of(value)} is no kind of {union}", f"write {KINDS[value.held]}", path, value.origin)
        return
    near = difflib.get_close_matches(str(value.held), [*map(kind_of, nodes), *later], 1)
    asked = f", did you mean {near[0]}?" if near and isinstance(value.held, str) else ""
    report.add(f"{text_of(value)} is no kind of {union}{asked}", f"use {kinds(nodes)}", path, value.origin)


def unknown(name: str, path: str, known: list[str], origin: Origin, report: Report) -> None:
    """Says that a key is not known, and which one is near, or what it is here that another tool calls so."""
    elsewhere = NAMES.get(name)
    if elsewhere is not None:
        here = elsewhere[0].replace("=", ": ")
        report.add(f"unknown key, which is {here} here ({elsewhere[1]})", f"write {here}", path, origin)
        return
    near = difflib.get_close_matches(name, known, 1, 0.5) if len(report.problems) < MOST_GUESSES else []
    if near:
        report.add(f"unknown key, did you mean {near[0]}?", f"write {near[0]}", path, origin)
    else:
        report.add("unknown key", f"use one of {', '.join(known)}", path, origin)


def way_out(hint: Any, value: Value) -> str:
    """One thing to do about a value of the wrong type."""
    members = options(hint)
    if value.held == "" and str in members:
        return "give a value"
    if str in members and not isinstance(value.held, dict | list):
        return "quote it"
    if isinstance(value.held, str | dict) and all(get_origin(option) is tuple for option in members):
        return _listed(members[0], value)
    literals = [str(name) for option in members if get_origin(option) is Literal for name in get_args(option)]
    near = difflib.get_close_matches(str(value.held), literals, 1) if isinstance(value.held, str) else []
    if near:
        return f"use {near[0]}"
    if {int, float, bool} & set(members) and value.is_text and value.held and value.origin.kind != "python":
        return "take the quotes away"
    return f"use {names(hint)}"


def _listed(hint: Any, value: Value) -> str:
    """How one thing becomes the list of it."""
    if isinstance(value.held, dict):
        return "write [...] around it"
    held = json.dumps(value.held, ensure_ascii=False) if value.origin.kind == "python" else value.held
    return f"write [{_written_out(options(get_args(hint)[0]), value) or value.origin.written or held}]"


def _written_out(nodes: list[Any], value: Value) -> str:
    """The mapping that a bare word is short for: a path that ends like the files of one of the kinds, or KIND:WHAT."""
    kind, colon, what = value.held.partition(":") if isinstance(value.held, str) else ("", "", "")
    if colon and what and any(kind_of(node) == kind and hasattr(node, "_keyed") for node in nodes):
        return f"{{{kind}: {what.strip()}}}"
    for node in filter(dataclasses.is_dataclass, nodes):
        if isinstance(value.held, str) and "path" in hints(node) and value.held.endswith(f".{kind_of(node)}"):
            return f"{{kind: {kind_of(node)}, path: {value.origin.written or value.held}}}"
    return ""


def text_of(value: Value) -> str:
    """What was written, short; never what the environment held."""
    held = value.held
    if isinstance(held, dict | list | tuple):
        return "a mapping" if isinstance(held, dict) else "a list"
    return cut(value.origin.written or (repr(held) if value.is_text else yaml_word(held)) or "nothing", 60)


def cut(text: str, most: int) -> str:
    """A text of at most `most` letters, dots in the place of what is left out."""
    return text if len(text) <= most else text[: most - 3] + "..."


def yaml_word(value: Any) -> str:
    """A value as a recipe writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
