"""Releases of what a server stands on that are unsafe before strangers: with one of them it does not start."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from llmkit.core.errors import RecipeError

FLOORS = {
    "torch": ("2.10.0", "CVE-2026-24747"),
    "starlette": ("0.49.1", "CVE-2025-62727"),
    "h11": ("0.16.0", "CVE-2025-43859"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
}
"""Package -> the first release that is sound, and what is wrong with those before it."""


def check_floors(found: Callable[[str], str] = version) -> None:
    """
    Raises:
        RecipeError: a package is too old; the package, its version and the id of the fault are named.
    """
    for name, (least, id) in FLOORS.items():
        try:
            here = found(name)
        except PackageNotFoundError:
            continue
        if _numbers(here) < _numbers(least):
            what = f"{name} {here} is not safe before strangers ({id})"
            raise RecipeError(what, fix=f"pip install '{name}>={least}'")


def _numbers(said: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", said.partition("+")[0])[:3])
