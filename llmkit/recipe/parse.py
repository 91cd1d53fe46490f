"""YAML text to a tree of `Value`s with places: a scalar stays text until its field's type reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from llmkit.core.errors import RecipeError
from llmkit.core.scalars import Origin, Value
from llmkit.core.wording import Report
from llmkit.recipe.shipped import meant

MOST_BYTES, MOST_DEPTH, MOST_NODES = 1 << 20, 64, 20_000
PLAIN_TAGS = {"str", "int", "float", "bool", "null", "timestamp", "seq", "map", "value", "merge"}
"""What YAML gives to untagged nodes; we read none of them but the shape."""
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
"""Control characters, halves of letters, and what turns the direction of text: what is seen is not what is read."""


def parse_file(path: Path, report: Report) -> Value:
    """The tree of a recipe file; what a tree can do without (a tag, a key written twice) goes into the report.

    Raises:
        RecipeError: there is no tree to be had.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as cause:
        why = getattr(cause, "strerror", None) or cause
        known = meant(name)
        fix = f"copy it with llmkit recipes {known}" if known else "give a recipe's path; `llmkit recipes` lists some"
        raise RecipeError(f"cannot be read ({why})", fix=fix, file=name) from cause
    if len(raw) > MOST_BYTES:
        raise RecipeError("is larger than 1 MiB", fix="move data out of the recipe", file=name, line=1)
    return parse(_text(raw, name), name, report)


def _text(raw: bytes, name: str) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = raw[: cause.start].count(b"\n") + 1
        what = f"byte {cause.start} is not UTF-8"
        raise RecipeError(what, fix="save the file as UTF-8", file=name, line=line) from cause
    return text


def parse(text: str, name: str, report: Report, kind: str = "file") -> Value:
    """The tree of a text; `name` is the file in errors, `kind` where the text comes from.

    Raises:
        RecipeError: there is no tree to be had.
    """
    if (unseen := UNSEEN.search(text)) is not None:
        line, column = text.count("\n", 0, unseen.start()) + 1, unseen.start() - text.rfind("\n", 0, unseen.start())
        what = f"holds the character U+{ord(unseen[0]):04X}, which is not seen"
        raise RecipeError(what, fix="delete it", file=name, line=line, column=column)
    try:
        _scan(text, name)
        documents = list(yaml.compose_all(text, Loader=Loader))
    except yaml.MarkedYAMLError as cause:
        raise _marked(cause, text, name) from cause
    except yaml.YAMLError as cause:
        raise RecipeError(str(cause).splitlines()[0], fix="mend the YAML", file=name, line=1) from cause
    if len(documents) > 1:
        line = int(documents[1].start_mark.line) + 1
        raise RecipeError("holds two documents", fix="keep one: delete the second `---`", file=name, line=line)
    if not documents:
        raise RecipeError("is empty", fix="write a recipe; `llmkit recipes` lists examples", file=name, line=1)
    return _Tree(name, kind, report).value(documents[0], "")


def _scan(text: str, name: str) -> None:
    """Depth, size and aliases, before any tree is built."""
    depth = nodes = 0
    for event in yaml.parse(text, Loader=Loader):
        if isinstance(event, yaml.AliasEvent):
            _refuse(f"uses the alias *{event.anchor}", "write the value out, or share it with `extends`", name, event)
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            _refuse(f"nests deeper than {MOST_DEPTH}", "make the recipe flatter", name, event)
        if nodes > MOST_NODES:
            _refuse(f"holds more than {MOST_NODES} values", "move data out of the recipe", name, event)


def _refuse(what: str, fix: str, name: str, event: Any) -> NoReturn:
    mark = event.start_mark
    raise RecipeError(what, fix=fix, file=name, line=mark.line + 1, column=mark.column + 1)


def _marked(cause: yaml.MarkedYAMLError, text: str, name: str) -> RecipeError:
    mark = cause.problem_mark or cause.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 0)
    lines = text.split("\n")
    tab = line <= len(lines) and "\t" in lines[line - 1]
    fix = "indent with spaces, not tabs" if tab else "mend the YAML here"
    what = cause.problem or cause.context or "is not YAML"
    return RecipeError(what, fix=fix, file=name, line=line, column=column)


class _Tree:
    """Composed YAML nodes to `Value`s."""

    def __init__(self, name: str, kind: str, report: Report) -> None:
        self.name, self.kind, self.report = name, kind, report

    def origin(self, node: yaml.Node) -> Origin:
        """Where a node was written."""
        if self.kind != "file":
            return Origin(self.kind)
        return Origin(self.kind, self.name, node.start_mark.line + 1, node.start_mark.column + 1)

    def value(self, node: yaml.Node, key: str) -> Value:
        """The value of a node."""
        origin = self.origin(node)
        if node.tag.removeprefix("tag:yaml.org,2002:") not in PLAIN_TAGS:
            self.report.add(f"carries the tag {node.tag}", "take the tag away", key, origin)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, origin)
        if isinstance(node, yaml.SequenceNode):
            return Value([self.value(item, f"{key}.{index}") for index, item in enumerate(node.value)], origin)
        return Value(node.value, origin, quoted=getattr(node, "style", None) in ("'", '"', "|", ">"))

    def _mapping(self, node: yaml.MappingNode, key: str, origin: Origin) -> Value:
        held: dict[str, Value] = {}
        keys: dict[str, Origin] = {}
        for key_node, value_node in node.value:
            place, name = self.origin(key_node), key_node.value
            path = f"{key}.{name}" if key else str(name)
            if not isinstance(key_node, yaml.ScalarNode):
                self.report.add("has a key that is not text", "write a plain key", key, place)
            elif not name.isascii():
                self.report.add("has letters outside ASCII", "type the key again in plain letters", path, place)
            elif name in held:
                what = f"is written twice, first in line {keys[name].line}"
                self.report.add(what, "keep one of the two", path, place)
            else:
                held[name], keys[name] = self.value(value_node, path), place
        return Value(held, origin, keys=keys)
