"""Reading one scalar by its type: what a recipe writes stays text until here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Where a value was written."""

    kind: str = "python"
    """default, file, command line or python"""
    file: str = ""
    line: int = 0
    column: int = 0
    written: str = ""
    """Of a value that was read from the environment: the text that asked for it, which is all that is ever shown."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.kind == "file" else self.kind


@dataclass(frozen=True)
class Value:
    """A written value: text (its type not yet decided), a Python value, or a list or mapping of `Value`s."""

    held: Any
    origin: Origin = Origin()
    quoted: bool = True
    keys: Mapping[str, Origin] = field(default_factory=dict)
    """Of a mapping: where each key was written."""
    bare: Value | None = None
    """Of a mapping that overrides put over a bare word: that word (`model: NAME`, then `model.attention=eager`)."""

    @property
    def is_text(self) -> bool:
        """Whether it can only be text: quoted in a file, or given as `str` in Python."""
        return isinstance(self.held, str) and self.quoted and not self.origin.written

    @property
    def is_plain(self) -> bool:
        """Whether YAML 1.1 could have read it as something else than text."""
        return isinstance(self.held, str) and not self.quoted and not self.origin.written

    @property
    def is_null(self) -> bool:
        """Whether nothing stands there."""
        return self.held is None or (self.is_plain and self.held in ("null", "~", ""))


UNITS = {
    "duration": {"s": 1, "m": 60, "h": 3600, "d": 86400},
    "bytes": {
        **{"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
        **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    },
}
NOTHING = {"null", "~", ""}
EMPTY = "is empty"
AMBIGUOUS = {"yes", "no", "on", "off", "y", "n", "true", "false"} | NOTHING
DATE = r"\d{4}-\d\d?-\d\d?([Tt ].*)?"
BAD: Any = object()
"""The mark of a value that could not be made."""


def read_bool(value: Value, problems: list[str]) -> Any:
    """true or false, as a value or as that text."""
    if isinstance(value.held, bool):
        return value.held
    known = {"true": True, "false": False}
    return known.get(value.held, BAD) if isinstance(value.held, str) and not value.is_text else BAD


def read_int(value: Value, problems: list[str]) -> Any:
    """A whole number; what may be octal is refused."""
    held = value.held
    if isinstance(held, int) and not isinstance(held, bool):
        return held
    if not isinstance(held, str) or value.is_text or _octal(held, problems):
        return BAD
    return int(held) if len(held) <= 40 and re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", held, re.ASCII) else BAD


def read_float(value: Value, problems: list[str]) -> Any:
    """A number; what is not finite is refused."""
    held = value.held
    if isinstance(held, int | float) and not isinstance(held, bool):
        return _finite(held)
    if not isinstance(held, str) or value.is_text or _octal(held, problems):
        return BAD
    plain = r"[+-]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
    return _finite(float(held)) if len(held) <= 60 and re.fullmatch(plain, held, re.ASCII) else BAD


def _finite(number: int | float) -> Any:
    try:
        made = float(number)
    except OverflowError:
        return BAD
    return made if math.isfinite(made) else BAD


def _octal(held: str, problems: list[str]) -> bool:
    if re.fullmatch(r"[+-]?0[0-9_]+", held):
        problems.append(f"{held} may be octal or decimal")
        return True
    return False


def read_str(value: Value, problems: list[str]) -> Any:
    """Text; what YAML 1.1 might take for something else must be quoted."""
    if not isinstance(value.held, str):
        return BAD
    if value.is_plain and value.held.lower() in AMBIGUOUS:
        other = "nothing" if value.held.lower() in NOTHING else "a yes or no"
        problems.append(f"{value.held} may be text or {other}" if value.held else EMPTY)
        return BAD
    if value.is_plain and re.fullmatch(DATE, value.held):
        problems.append(f"{value.held} may be text or a date")
        return BAD
    return value.held


def measured(text: str, unit: str) -> float | None:
    """A number with a unit, in seconds or bytes, or nothing."""
    match = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]+)", text, re.ASCII)
    factor = UNITS[unit].get(match[2]) if match else None
    return float(match[1]) * factor if match and factor else None
