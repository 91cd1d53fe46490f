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


UNITS = {
    "duration": {"s": 1, "m": 60, "h": 3600, "d": 86400},
    "bytes": {
        **{"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
        **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    },
}
AMBIGUOUS = {"yes", "no", "on", "off", "y", "n", "true", "false", "null", "~", ""}
BAD: Any = object()
"""The mark of a value that could not be made."""


def read_bool(value: Value, problems: list[str]) -> Any:
    """true or false, as a value or as that text."""
    if isinstance(value.held, bool):
        return value.held
    return {"true": True, "false": False}.get(value.held, BAD) if isinstance(value.held, str) else BAD


def read_int(value: Value, problems: list[str]) -> Any:
    """A whole number; what may be octal is refused."""
    held = value.held
    if isinstance(held, int) and not isinstance(held, bool):
        return held
    if not isinstance(held, str) or (value.quoted and value.origin.kind != "python"):
        return BAD
    if re.fullmatch(r"[+-]?0[0-9_]+", held):
        problems.append(f"{held} may be octal or decimal")
        return BAD
    if len(held) <= 40 and re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", held) and value.origin.kind != "python":
        return int(held)
    return BAD


def read_float(value: Value, problems: list[str]) -> Any:
    """A number; what is not finite is refused."""
    held = value.held
    if isinstance(held, int | float) and not isinstance(held, bool):
        return float(held) if math.isfinite(held) else BAD
    if not isinstance(held, str) or value.quoted or value.origin.kind == "python":
        return BAD
    if re.fullmatch(r"[+-]?0[0-9_]+", held):
        problems.append(f"{held} may be octal or decimal")
        return BAD
    plain = r"[+-]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
    made = float(held) if len(held) <= 60 and re.fullmatch(plain, held) else math.nan
    return made if math.isfinite(made) else BAD


def read_str(value: Value, problems: list[str]) -> Any:
    """Text; what YAML 1.1 might take for something else must be quoted."""
    if not isinstance(value.held, str):
        return BAD
    if not value.quoted and value.held.lower() in AMBIGUOUS:
        problems.append(f"{value.held or 'nothing'} may be text or not")
        return BAD
    if not value.quoted and re.fullmatch(r"\d{4}-\d\d?-\d\d?([Tt ].*)?", value.held):
        problems.append(f"{value.held} may be text or a date")
        return BAD
    return value.held


def measured(text: str, unit: str) -> float | None:
    """A number with a unit, in seconds or bytes, or nothing."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", text)
    factor = UNITS[unit].get(match[2]) if match else None
    return float(match[1]) * factor if match and factor else None
