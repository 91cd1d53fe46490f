"""Who may ask: keys, one a line of a file, with a tenant and limits."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmkit.core.errors import RecipeError
from llmkit.serve.refusal import Refusal

HASHED = re.compile(r"sha256:([0-9a-f]{64})")
SHORTEST = 16
"""Letters of a key: a shorter one can be guessed."""
MINUTE = 60.0


@dataclass(frozen=True)
class Limits:
    """What a key may ask for; 0 is no bound."""

    rpm: int = 0
    """Requests a minute."""
    tpm: int = 0
    """Tokens of prompts and answers a minute."""
    requests: int = 0
    """Answers at once."""


@dataclass(frozen=True)
class Key:
    """One line of the file."""

    digest: str
    """SHA-256: the key itself is kept nowhere."""
    tenant: str
    limits: Limits = Limits()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file of lines `KEY [TENANT [rpm=60 tpm=100000 requests=8]]`; a KEY may be `sha256:HEX` of it.

    Raises:
        RecipeError: it cannot be read, or a line is none of these.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        why = cause.strerror if isinstance(cause, OSError) else "it is no UTF-8"
        raise RecipeError(f"cannot be read: {why}", fix="give a file of keys", file=str(path)) from cause
    numbered = ((number, line.split()) for number, line in enumerate(lines, 1) if not line.lstrip().startswith("#"))
    keys = [_key(path, number, words) for number, words in numbered if words]
    if not keys:
        raise RecipeError("holds no key", fix="write one a line", file=str(path))
    if len({key.digest for key in keys}) < len(keys):
        raise RecipeError("holds a key twice", fix="give each client a key of its own", file=str(path))
    return tuple(keys)


def _key(path: Path, number: int, words: list[str]) -> Key:
    own, *rest = words
    hashed = HASHED.fullmatch(own)
    if hashed is None and len(own) < SHORTEST:
        what = f"the key has fewer than {SHORTEST} letters"
        raise RecipeError(what, fix="make one with: openssl rand -hex 32", file=str(path), line=number)
    digest = hashed[1] if hashed is not None else hashlib.sha256(own.encode()).hexdigest()
    tenant = rest.pop(0) if rest and "=" not in rest[0] else digest[:12]
    limits = Limits()
    for word in rest:
        name, _, value = word.partition("=")
        if name not in vars(limits) or not (value.isascii() and value.isdigit()):
            what = f"{word[:40]!r} is no limit"
            raise RecipeError(what, fix="write rpm=N, tpm=N or requests=N", file=str(path), line=number)
        limits = replace(limits, **{name: int(value)})
    return Key(digest, tenant, limits)


def find(keys: tuple[Key, ...], header: str) -> Key | None:
    """The key that an `Authorization` header brings; it takes as long whichever it is, and if it is none."""
    scheme, _, own = header.partition(" ")
    digest = hashlib.sha256(own.strip().encode()).hexdigest()
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest) and scheme.lower() == "bearer":
            found = key
    return found


@dataclass
class Meter:
    """What keys have used of their minute, each as a bucket that fills again; in memory, so for one server alone."""

    left: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """What is left, and when that was so."""

    def take(self, key: Key, amounts: Mapping[str, int], now: float | None = None) -> None:
        """Uses up requests (`rpm`) or tokens (`tpm`).

        Raises:
            Refusal: 429, and after how long there is enough again.
        """
        now = time.monotonic() if now is None else now
        for name, amount in amounts.items():
            most = getattr(key.limits, name)
            least = min(amount, most)  # one that asks for more than a minute's gets all of it
            if most and (left := self._left(key, name, now)) < least:
                what = {"rpm": "requests", "tpm": "tokens"}[name]
                wait = (least - left) * MINUTE / most
                raise Refusal(429, f"{most} {what} a minute are used up", code="rate_limit_exceeded", wait=wait)
        for name, amount in amounts.items():
            self.spend(key, name, amount, now)

    def spend(self, key: Key, name: str, amount: int, now: float | None = None) -> None:
        """The same for what is there already: it may use up more than there is, which later ones wait for."""
        now = time.monotonic() if now is None else now
        if getattr(key.limits, name):
            self.left[key.digest, name] = (self._left(key, name, now) - amount, now)

    def _left(self, key: Key, name: str, now: float) -> float:
        most = float(getattr(key.limits, name))
        left, then = self.left.get((key.digest, name), (most, now))
        return min(most, left + (now - then) * most / MINUTE)
