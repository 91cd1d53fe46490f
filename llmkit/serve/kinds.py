"""Kinds of fields: how each is read, and what the server's own document says of it. One dataclass says both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from llmkit.serve.described import TOKEN, Schema, closed, listed
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.node import Bounds

T = TypeVar("T")
Most = int | str
"""A bound, or the name of one of `Bounds`."""


class Kind(Protocol):
    """What a field may hold."""

    def read(self, fields: Fields, key: str, bounds: Bounds) -> Any:
        """Its value.

        Raises:
            Refusal: it holds something else.
        """
        ...

    def schema(self, bounds: Bounds) -> Schema:
        """The same as JSON Schema, without null, which is as if a field were not there."""
        ...


def shaped(kind: Kind) -> Any:
    """A field of a shape."""
    return field(metadata={"kind": kind})


def parse(shape: type[T], fields: Fields, bounds: Bounds) -> T:
    """The fields that a shape names.

    Raises:
        Refusal: one cannot be used.
    """
    return shape(**{name: kind.read(fields, name, bounds) for name, kind in _kinds(shape).items()})


def _kinds(shape: Any) -> dict[str, Kind]:
    return {item.name: item.metadata["kind"] for item in dataclasses.fields(shape)}


def object_of(
    *shapes: type[Any], bounds: Bounds, ignored: tuple[str, ...] = (), required: tuple[str, ...] = ()
) -> Schema:
    """An object with the fields of some shapes, and with those that are taken and nothing follows from."""
    held: dict[str, Schema] = {name: {"description": "taken; nothing follows from it"} for name in ignored}
    for name, kind in (item for shape in shapes for item in _kinds(shape).items()):
        said = kind.schema(bounds)
        held[name] = said if name in required else _nullable(said)
    return closed(required, **held)


def _nullable(schema: Schema) -> Schema:
    """Null too."""
    if "enum" in schema:
        schema = schema | {"enum": [*schema["enum"], None]}
    kind = schema.get("type")
    if isinstance(kind, str) and kind != "null":
        return schema | {"type": [kind, "null"]}
    return schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]} if "anyOf" in schema else schema


def _bound(most: Most, bounds: Bounds) -> int:
    return int(getattr(bounds, most)) if isinstance(most, str) else most


@dataclass(frozen=True)
class Text:
    """A text."""

    default: str = ""
    letters: int | None = None
    """As many as its route takes; that is for the document alone."""

    def read(self, fields: Fields, key: str, bounds: Bounds) -> str:
        """It, or the default."""
        return fields.text(key, self.default)

    def schema(self, bounds: Bounds) -> Schema:
        """Any text, or one of so many letters."""
        return {"type": "string"} | ({} if self.letters is None else {"maxLength": self.letters})


@dataclass(frozen=True)
class Flag:
    """True or false."""

    default: bool | None = False

    def read(self, fields: Fields, key: str, bounds: Bounds) -> bool | None:
        """It, or the default."""
        return fields.flag(key, self.default)

    def schema(self, bounds: Bounds) -> Schema:
        """With its default."""
        return {"type": "boolean"} | ({} if self.default is None else {"default": self.default})


@dataclass(frozen=True)
class Whole:
    """A whole number."""

    least: int
    most: Most
    default: int | None = None

    def read(self, fields: Fields, key: str, bounds: Bounds) -> int | None:
        """It, or the default."""
        return fields.whole(key, self.default, self.least, _bound(self.most, bounds))

    def schema(self, bounds: Bounds) -> Schema:
        """Within its bounds."""
        made: Schema = {"type": "integer", "minimum": self.least, "maximum": _bound(self.most, bounds)}
        return made if self.default is None else made | {"default": self.default}


@dataclass(frozen=True)
class Number:
    """A number."""

    least: float
    most: float
    default: float | None = None

    def read(self, fields: Fields, key: str, bounds: Bounds) -> float | None:
        """It, or the default."""
        return fields.number(key, self.default, self.least, self.most)

    def schema(self, bounds: Bounds) -> Schema:
        """Within its bounds."""
        made: Schema = {"type": "number", "minimum": self.least, "maximum": self.most}
        return made if self.default is None else made | {"default": self.default}


@dataclass(frozen=True)
class Choice:
    """One of some words; without a default it has to be there."""

    among: tuple[str, ...]
    default: str = ""

    def read(self, fields: Fields, key: str, bounds: Bounds) -> str:
        """It, or the default."""
        return fields.choice(key, self.default, self.among)

    def schema(self, bounds: Bounds) -> Schema:
        """The words."""
        return {"type": "string", "enum": list(self.among)}


@dataclass(frozen=True)
class Texts:
    """A list of texts; one text stands for a list of it."""

    most: int
    letters: int | None = None
    """Of one, which then is not empty either."""

    def read(self, fields: Fields, key: str, bounds: Bounds) -> tuple[str, ...]:
        """All of them."""
        found = fields.texts(key, self.most)
        if self.letters is not None and any(not text or len(text) > self.letters for text in found):
            raise wrong(fields.name(key), f"holds a text that is empty or longer than {self.letters} letters")
        return found

    def schema(self, bounds: Bounds) -> Schema:
        """A text, or a list."""
        one: Schema = {"type": "string"}
        one |= {} if self.letters is None else {"minLength": 1, "maxLength": self.letters}
        return {"anyOf": [one, listed(one, self.most)]}


@dataclass(frozen=True)
class Ids:
    """A list of token ids."""

    most: Most

    def read(self, fields: Fields, key: str, bounds: Bounds) -> tuple[int, ...]:
        """All of them."""
        return fields.ids(key, _bound(self.most, bounds))

    def schema(self, bounds: Bounds) -> Schema:
        """Whole numbers, none below 0."""
        return listed(TOKEN, _bound(self.most, bounds))


@dataclass(frozen=True)
class Free:
    """Whatever is there: its route takes it apart, and `said` describes it."""

    said: Mapping[str, Any]

    def read(self, fields: Fields, key: str, bounds: Bounds) -> Any:
        """As it came."""
        return fields.get(key)

    def schema(self, bounds: Bounds) -> Schema:
        """As it is described."""
        return dict(self.said)
