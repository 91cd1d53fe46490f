"""What llmkit ships beside its code: recipes, constitutions, and the scripts of launchers."""

from __future__ import annotations

from pathlib import Path


def folder(name: str = "recipes") -> Path:
    """Where they are: in an installed wheel, or beside the sources."""
    package = Path(__file__).parents[1]
    inside = package / "_shipped" / name
    return inside if inside.is_dir() else package.parent / name
