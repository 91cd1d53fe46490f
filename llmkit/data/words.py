"""Tokens of ASCII text by its words, each tokenised once: the ids of the tokenizer itself, several times faster.

A byte-level BPE cuts a text at its added tokens, cuts the rest to words by a pattern, and merges within words alone.
For the patterns in use, what they find in ASCII is known to Python's `re` too; any other tokenizer, and any text with
other letters, goes the plain way.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any

SIGNS = "–—‘’“”…£€°•×÷±§©®™«»¡¿"
"""Signs of prose: neither letter, number nor space to any pattern."""
PLAIN = re.compile(rf"[\t\n\r -~{SIGNS}]*")
"""Texts whose words are sure."""
MOST = 1 << 18
"""Words that are kept."""
LONGEST = 64
"""Letters of a word that is kept."""
_PARTS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_PARTS}| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
_DIGITS = rf"[0-9]|{_PARTS}| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{NUMBER}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {_SPLIT.replace("{NUMBER}", number): number for number in ("", "{1,3}")}
"""Patterns of Qwen and of Llama 3, as their files write them, and how many digits a word of theirs has."""


class Words(dict[str, tuple[int, ...]]):
    """The ids of each word of a tokenizer; an unknown one is tokenised when it is asked for."""

    def __init__(self, backend: Any, spec: dict[str, Any], pattern: str, trims: bool) -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        added = sorted((token["content"] for token in spec["added_tokens"]), key=len, reverse=True)
        self.added: dict[str, tuple[int, ...]] = {token["content"]: (token["id"],) for token in spec["added_tokens"]}
        """These are no words: to the model they would be text."""
        self.update(self.added)
        self.cut = re.compile(f"({'|'.join(map(re.escape, added))})" if added else r"((?!))")
        self.find: Callable[[str], list[str]] = re.compile(pattern).findall
        self.model, self.bytes, self.trims = backend.model, ByteLevel(add_prefix_space=False, use_regex=False), trims
        self.blank: dict[str, tuple[bool, ...]] = {}
        """Of words with tokens of spaces alone, whose place the tokenizer says is empty: which tokens those are."""

    def __missing__(self, word: str) -> tuple[int, ...]:
        ((letters, _),) = self.bytes.pre_tokenize_str(word)
        tokens = self.model.tokenize(letters)
        ids = tuple(int(token.id) for token in tokens)
        if len(self) >= MOST + len(self.added):
            self.clear()
            self.update(self.added)
        if self.trims and any(not token.value.strip("Ġ") for token in tokens):
            self.blank[word] = tuple(not token.value.strip("Ġ") for token in tokens)
        if len(word) <= LONGEST:
            self[word] = ids
        return ids

    def encode(
        self, text: str, spans: Sequence[tuple[int, int]], weights: Sequence[float]
    ) -> tuple[list[int], list[float]] | None:
        """(ids, weights) of a text, whose tokens within a span weigh as it says; None where words do not tell."""
        if not PLAIN.fullmatch(text):
            return None
        words: list[str] = []
        for index, piece in enumerate(self.cut.split(text)):
            if index % 2:
                words.append(piece)
            elif piece:
                words += self.find(piece)
        parts = [self[word] for word in words]
        ends = list(accumulate(map(len, words), initial=0))
        tokens = list(accumulate(map(len, parts), initial=0))
        made = [0.0] * tokens[-1]
        blank = bool(self.blank) and not self.blank.keys().isdisjoint(words)
        for (start, end), weight in zip(spans, weights, strict=True):
            first, last = bisect_left(ends, start), bisect_left(ends, end)
            if ends[first : first + 1] != [start] or ends[last : last + 1] != [end]:
                return None  # it begins or ends within a word
            made[tokens[first] : tokens[last]] = [weight] * (tokens[last] - tokens[first])
            for index in range(first, last) if blank else ():
                for place, empty in enumerate(self.blank.get(words[index], ()), tokens[index]):
                    made[place] = 0.0 if empty else weight
        return list(chain.from_iterable(parts)), made


def words(tokenizer: Any) -> Words | None:
    """The words of a tokenizer; None for one that does not cut in a way that is known."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    added = spec["added_tokens"]
    odd = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
    if odd or len({token["normalized"] for token in added}) > 1 or spec["normalizer"]:
        return None
    model = spec["model"]
    plain = model["type"] == "BPE" and not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    )
    pattern = _pattern(spec["pre_tokenizer"])
    if not plain or not pattern:
        return None
    return Words(tokenizer.backend_tokenizer, spec, pattern, _trims(spec["post_processor"]))


def _pattern(spec: dict[str, Any] | None) -> str:
    """What Python's `re` finds the same words by, or nothing."""
    steps = [] if spec is None else spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return ""
    whole = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"]:
        return _GPT2 if whole else ""
    if kinds == ["Digits", "ByteLevel"] and whole and steps[0]["individual_digits"]:
        return _DIGITS
    if kinds == ["Split", "ByteLevel"] and not whole:
        split = steps[0]
        number = SPLITS.get(split["pattern"].get("Regex", ""))
        if number is not None and split["behavior"] == "Isolated" and not split["invert"]:
            return (
                rf"(?i:{_PARTS})|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{number}| ?[^\sA-Za-z0-9]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
    return ""


def _trims(spec: dict[str, Any] | None) -> bool:
    steps = [] if spec is None else spec["processors"] if spec["type"] == "Sequence" else [spec]
    return any(step.get("trim_offsets") for step in steps)
