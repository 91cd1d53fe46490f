"""What llmkit ships beside its code: recipes by name, and the scripts of launchers."""

from __future__ import annotations

from pathlib import Path


def folder(name: str = "recipes") -> Path:
    """Where they are: in an installed wheel, or beside the sources."""
    package = Path(__file__).parents[1]
    inside = package / "_shipped" / name
    return inside if inside.is_dir() else package.parent / name


def recipes() -> dict[str, Path]:
    """Each one's file by its name, such as `sft/lora`."""
    top = folder()
    return {str(path.relative_to(top).with_suffix("")): path for path in sorted(top.rglob("*.yaml"))}


def meant(given: str) -> str:
    """The name of the one that a path which leads nowhere ends like (`sft/lora`, `lora.yaml`), or nothing."""
    asked = Path(given).with_suffix("").parts
    found = [name for name in recipes() if asked and Path("recipes", name).parts[-len(asked) :] == asked]
    return found[0] if len(found) == 1 else ""
