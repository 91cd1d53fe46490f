"""YAML text to a tree of `Value`s with places: a scalar stays text until its field's type reads it."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import yaml

from llmkit.core.convert import Origin, Value
from llmkit.core.errors import RecipeError

MOST_BYTES, MOST_DEPTH, MOST_NODES = 1 << 20, 64, 100_000
PLAIN_TAGS = {"str", "int", "float", "bool", "null", "timestamp", "seq", "map", "value", "merge"}
"""What YAML gives to untagged nodes; we read none of them but the shape."""
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_file(path: Path) -> Value:
    """The tree of a recipe file.

    Raises:
        RecipeError: it cannot be read, or holds what a recipe must not.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as cause:
        raise RecipeError(
            f"cannot be read ({cause.strerror})",
            fix="give the path of a recipe; `llmkit recipes` lists some",
            file=name,
        ) from cause
    if len(raw) > MOST_BYTES:
        raise RecipeError("is larger than 1 MiB", fix="move data out of the recipe", file=name, line=1)
    return parse(_text(raw, name), name)


def _text(raw: bytes, name: str) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = raw[: cause.start].count(b"\n") + 1
        raise RecipeError(
            f"byte {cause.start} is not UTF-8", fix="save the file as UTF-8", file=name, line=line
        ) from cause
    for number, line_text in enumerate(text.splitlines(), 1):
        for column, letter in enumerate(line_text, 1):
            if letter == "\0" or unicodedata.bidirectional(letter) in _BIDI:
                what = "a NUL" if letter == "\0" else f"a bidirectional control (U+{ord(letter):04X})"
                raise RecipeError(f"holds {what}", fix="delete it", file=name, line=number, column=column)
    return text


_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def parse(text: str, name: str, kind: str = "file") -> Value:
    """The tree of a text; `name` is the file in errors."""
    try:
        _scan(text, name)
        documents = list(yaml.compose_all(text, Loader=Loader))
    except yaml.MarkedYAMLError as cause:
        raise _marked(cause, text, name) from cause
    except yaml.YAMLError as cause:
        raise RecipeError(str(cause).splitlines()[0], fix="mend the YAML", file=name, line=1) from cause
    if len(documents) > 1:
        line = _line(documents[1])
        raise RecipeError("holds two documents", fix="keep one: delete the second `---`", file=name, line=line)
    if not documents or documents[0] is None:
        raise RecipeError("is empty", fix="write a recipe; `llmkit recipes` lists examples", file=name, line=1)
    return _Tree(name, kind).value(documents[0], "")


def _line(node: Any) -> int:
    """1-based."""
    return int(node.start_mark.line) + 1 if node is not None else 1


def _scan(text: str, name: str) -> None:
    """Depth, size and aliases, before any tree is built."""
    depth = nodes = 0
    for event in yaml.parse(text, Loader=Loader):
        line = _line(event)
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(
                f"uses the alias *{event.anchor}",
                fix="write the value out, or share it with `extends`",
                file=name,
                line=line,
            )
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH or nodes > MOST_NODES:
            what = f"nests deeper than {MOST_DEPTH}" if depth > MOST_DEPTH else f"holds more than {MOST_NODES} values"
            raise RecipeError(what, fix="make the recipe smaller", file=name, line=line)


def _marked(cause: yaml.MarkedYAMLError, text: str, name: str) -> RecipeError:
    mark = cause.problem_mark or cause.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 0)
    lines = text.splitlines()
    tab = line <= len(lines) and "\t" in lines[line - 1]
    fix = "indent with spaces, not tabs" if tab else "mend the YAML here"
    what = cause.problem or cause.context or "is not YAML"
    return RecipeError(what, fix=fix, file=name, line=line, column=column)


class _Tree:
    """Composed YAML nodes to `Value`s."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def origin(self, node: yaml.Node) -> Origin:
        """Where a node was written."""
        if self.kind != "file":
            return Origin(self.kind)
        return Origin(self.kind, self.name, node.start_mark.line + 1, node.start_mark.column + 1)

    def value(self, node: yaml.Node, key: str) -> Value:
        """The value of a node."""
        origin = self.origin(node)
        if node.tag.removeprefix("tag:yaml.org,2002:") not in PLAIN_TAGS:
            self._fail(f"carries the tag {node.tag}", "take the tag away", key, origin)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, origin)
        if isinstance(node, yaml.SequenceNode):
            items = [self.value(item, f"{key}.{index}") for index, item in enumerate(node.value)]
            return Value(items, origin)
        style = getattr(node, "style", None)
        return Value(node.value, origin, quoted=style in ("'", '"', "|", ">"))

    def _mapping(self, node: yaml.MappingNode, key: str, origin: Origin) -> Value:
        held: dict[str, Value] = {}
        keys: dict[str, Origin] = {}
        for key_node, value_node in node.value:
            place = self.origin(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._fail("has a key that is not text", "write a plain key", key, place)
            name = key_node.value
            path = f"{key}.{name}" if key else name
            if not name.isascii():
                self._fail("has a key with letters outside ASCII", "type the key again in plain letters", path, place)
            if name in held:
                self._fail(f"is written twice, first in line {keys[name].line}", "keep one of the two", path, place)
            held[name], keys[name] = self.value(value_node, path), place
        return Value(held, origin, keys=keys)

    def _fail(self, what: str, fix: str, key: str, origin: Origin) -> None:
        raise RecipeError(what, fix=fix, file=origin.file, line=origin.line, column=origin.column, key=key)
