"""The recipes that llmkit ships, by name."""

from __future__ import annotations

from pathlib import Path

from llmkit.core.shipped import folder as folder

CONSTITUTIONS = "constitution"
"""The folder of what is no recipe."""


def recipes() -> dict[str, Path]:
    """Each one's file by its name, such as `sft/lora`."""
    top = folder()
    found = (path for path in sorted(top.rglob("*.yaml")) if path.parent != top / CONSTITUTIONS)
    return {str(path.relative_to(top).with_suffix("")): path for path in found}


def meant(given: str) -> str:
    """The name of the one that a path which leads nowhere ends like (`sft/lora`, `lora.yaml`), or nothing."""
    asked = Path(given).with_suffix("").parts
    found = [name for name in recipes() if asked and Path("recipes", name).parts[-len(asked) :] == asked]
    return found[0] if len(found) == 1 else ""
