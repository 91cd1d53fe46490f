"""The fields of a request's object, each read by its type; what nobody reads is refused by its name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from llmkit.serve.refusal import Refusal

D = TypeVar("D")
NEAR = 0.75
"""How much alike an unknown field and its guess are: less is another field, of another server."""


def wrong(key: str, what: str, code: str = "invalid_value") -> Refusal:
    """A field that cannot be used."""
    return Refusal(400, f"{key}: {what}", key=key, code=code)


class Fields:
    """An object; null is as if a field were not there. Every reader raises a `Refusal` that names the field."""

    def __init__(self, held: Any, at: str = "") -> None:
        """`at` is where it stands in the body."""
        if not isinstance(held, Mapping):
            raise wrong(at, "is not an object")
        self.held, self.at = held, at
        self.read: set[str] = set()

    def name(self, key: str) -> str:
        """The field as the client knows it."""
        return f"{self.at}.{key}" if self.at else key

    def get(self, key: str) -> Any:
        """Whatever is there."""
        self.read.add(key)
        return self.held.get(key)

    def text(self, key: str, default: str = "") -> str:
        """A text."""
        return str(self._of(key, str, "a text", default))

    def flag(self, key: str, default: D) -> bool | D:
        """True or false."""
        made: bool | D = self._of(key, bool, "true or false", default)
        return made

    def whole(self, key: str, default: D, least: int, most: int) -> int | D:
        """A whole number within bounds."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong(self.name(key), "is not a whole number")
        if not least <= value <= most:
            raise wrong(self.name(key), f"{str(value)[:40]} is not from {least} to {most}")
        return value

    def number(self, key: str, default: D, least: float, most: float) -> float | D:
        """A number within bounds."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise wrong(self.name(key), "is not a number")
        if not least <= value <= most:
            raise wrong(self.name(key), f"{str(value)[:40]} is not from {least:g} to {most:g}")
        return float(value)

    def choice(self, key: str, default: str, among: Collection[str]) -> str:
        """One of some words."""
        value = self.text(key, default)
        if value not in among:
            raise wrong(self.name(key), f"{value[:80]!r} is none of {', '.join(among)}")
        return value

    def items(self, key: str, most: int) -> list[Any]:
        """A list; empty where there is none."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise wrong(self.name(key), "is not a list")
        if len(value) > most:
            raise wrong(self.name(key), f"{len(value)} are more than {most}")
        return value

    def texts(self, key: str, most: int) -> tuple[str, ...]:
        """A list of texts; one text stands for a list of it."""
        held = [self.held[key]] if isinstance(self.held.get(key), str) else None
        self.read.add(key)
        found = held or self.items(key, most)
        if any(not isinstance(item, str) for item in found):
            raise wrong(self.name(key), "is not a list of texts")
        return tuple(found)

    def ids(self, key: str, most: int) -> tuple[int, ...]:
        """A list of token ids."""
        return whole_numbers(self.items(key, most), self.name(key))

    def object(self, key: str) -> Fields | None:
        """The fields of an object in it."""
        value = self.get(key)
        return None if value is None else Fields(value, self.name(key))

    def end(self, ignored: Collection[str] = ()) -> None:
        """All has been read: what is left is unknown. `ignored` are those that clients send and nothing follows from.

        Raises:
            Refusal: a field is none that there is.
        """
        for key in self.held:
            if key not in self.read and key not in ignored:
                near = difflib.get_close_matches(key[:80], [*self.read, *ignored], 1, NEAR)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise wrong(self.name(key[:80]), f"unknown field{hint}", "unknown_parameter")

    def _of(self, key: str, kind: type, said: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise wrong(self.name(key), f"is not {said}")
        return value


def whole_numbers(found: list[Any], name: str) -> tuple[int, ...]:
    """A list that holds nothing but whole numbers."""
    if any(not isinstance(item, int) or isinstance(item, bool) for item in found):
        raise wrong(name, "is not a list of whole numbers")
    return tuple(found)
