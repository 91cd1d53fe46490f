"""Writes what is generated: from the dataclasses one page per recipe kind and the JSON schema, and the table of support
from what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from llmkit.models import support
from llmkit.recipe.describe import markdown
from llmkit.recipe.kinds import KINDS
from llmkit.recipe.schema import schema

ROOT = Path(__file__).parents[2]


def pages() -> dict[Path, str]:
    """Each generated file and its text."""
    made = {ROOT / "docs" / "recipes" / f"{name}.md": markdown(cls) for name, cls in KINDS.items()}
    made[ROOT / "docs" / "support.md"] = support.page()
    return made | {ROOT / "recipes" / "schema.json": json.dumps(schema(), indent=1) + "\n"}


def main() -> None:
    """Writes them all."""
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
