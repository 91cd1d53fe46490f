"""Texts as small numbers: a digest of each, its shingles, and a sketch that tells near copies apart from others."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np

WIDTH = 16
"""Bytes of a shingle of a sketch: a power of two, about three words."""
KEPT = 16
"""Shingles that a sketch keeps: the smallest."""
LEAST = 64
"""Different shingles that a text must have to get a sketch: shorter ones are alike by chance."""
ODD = 0x9E3779B97F4A7C15
SPACE = re.compile(r"\s+")
WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]|[^\\W\u3040-\u30ff\u3400-\u9fff]+")
"""A word; of scripts that put no space between words, a letter."""

Hashes = np.ndarray[Any, np.dtype[np.uint64]]


def digest(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def mixed(numbers: Hashes) -> Hashes:
    """Each number spread over 64 bits (the finaliser of SplitMix64)."""
    one = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    two = (one ^ (one >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return two ^ (two >> np.uint64(31))


def sketch(text: str) -> Hashes:
    """The smallest `KEPT` hashes of a text's shingles of bytes; none of a short text. Case and space do not count."""
    plain = SPACE.sub(" ", text).strip().lower().encode("utf-8", "surrogatepass")
    window = np.frombuffer(plain, dtype=np.uint8).astype(np.uint64)
    if len(window) < LEAST + WIDTH:
        return window[:0]
    base, width = ODD, 1
    while width < WIDTH:  # two windows of one width, end to end, are one of twice that
        window = window[:-width] * np.uint64(base) + window[width:]
        base, width = base * base & (1 << 64) - 1, 2 * width
    hashes = mixed(window) >> np.uint64(32)
    smallest = np.unique(np.partition(hashes, 2 * KEPT)[: 2 * KEPT])
    if len(smallest) < KEPT:  # the same again and again
        smallest = np.unique(hashes)
    return smallest[:KEPT] if len(smallest) >= KEPT else smallest[:0]


def shingles(text: str, words: int) -> Hashes:
    """A hash of each run of `words` words, each once and sorted; of a shorter text, of all of it."""
    found = WORD.findall(text.casefold())
    if not found:
        return np.zeros(0, dtype=np.uint64)
    known = {word: digest(word) for word in set(found)}
    numbers = np.array([known[word] for word in found], dtype=np.uint64)
    size = min(words, len(numbers))
    total = np.zeros(len(numbers) - size + 1, dtype=np.uint64)
    for at in range(size):
        total = total * np.uint64(ODD) + numbers[at : at + len(total)]
    return np.unique(mixed(total))
