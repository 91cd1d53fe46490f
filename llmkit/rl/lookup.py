"""A tool that looks facts up by their key."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.core.errors import DataError
from llmkit.data.jsonl import read_jsonl
from llmkit.data.rows import BadRow
from llmkit.rl.environment import Unable, argument, described

MOST = 1_000_000
"""Facts."""
LONGEST = 200
"""Letters of what is looked up."""
NEAR = 5
"""Keys that are offered where none is the one."""
COMMON = 1000
"""A word of more keys than this says nothing of which is meant."""
WORD = re.compile(r"\w+")


class Lookup:
    """Facts of a file, by key; capitals and space make no difference."""

    def __init__(self, path: str, key: str, value: str, description: str) -> None:
        """
        Raises:
            DataError: the file cannot be read, or a row has no such columns.
        """
        self.function = described("lookup", description, "key", "What to look up.")
        self.facts: dict[str, str] = {}
        self.words: dict[str, list[str]] = {}
        for name, fact in _facts(path, key, value):
            plain = _plain(name)
            if plain not in self.facts:
                for word in set(WORD.findall(plain)):
                    self.words.setdefault(word, []).append(plain)
            self.facts[plain] = fact
        if not self.facts:
            raise DataError("holds no facts", fix="give a file with rows", file=path)

    def __call__(self, arguments: Mapping[str, Any]) -> str:
        """The fact.

        Raises:
            Unable: there is none; keys with the same words are named.
        """
        asked = argument(arguments, "key")
        if len(asked) > LONGEST:
            raise Unable(f"a key has up to {LONGEST} letters")
        found = self.facts.get(_plain(asked))
        if found is None:
            near = self._near(_plain(asked))
            raise Unable("nothing is known of it" + (f"; there is {', '.join(near)}" if near else ""))
        return found

    def _near(self, asked: str) -> list[str]:
        shared = Counter[str]()
        for word in set(WORD.findall(asked)):
            keys = self.words.get(word, ())
            shared.update(keys if len(keys) <= COMMON else ())
        return sorted(shared, key=lambda key: (-shared[key], key))[:NEAR]


def _plain(key: str) -> str:
    return " ".join(key.casefold().split())


def _facts(path: str, key: str, value: str) -> Iterator[tuple[str, str]]:
    for number, raw in enumerate(read_jsonl(path), 1):
        if isinstance(raw, BadRow):
            raise raw
        name, fact = raw.values.get(key), raw.values.get(value)
        if not isinstance(name, str) or not isinstance(fact, str | int | float) or isinstance(fact, bool):
            what = f"has no text in {key} and {value}"
            raise DataError(what, fix="name the columns (key, value)", file=raw.file, line=raw.line)
        if number > MOST:
            raise DataError(f"holds more than {MOST} facts", fix="give fewer", file=path)
        yield name, str(fact)
