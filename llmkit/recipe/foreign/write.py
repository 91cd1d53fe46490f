"""The recipe as a file, with what it leaves out as its first lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from llmkit.core.wording import cut, yaml_word
from llmkit.recipe.foreign.draft import Draft, Note

ORDER = ("kind", "model", "quant", "adapter", "data", "loss", "neftune", "batch", "micro_batch", "epochs", "steps")
WIDTH = 110


def text(draft: Draft, source: str) -> str:
    """The YAML of a draft; `source` is the name of the file that it comes from."""
    head = [f"# From {draft.tool}: {source}"]
    for fate, title in (("lost", "not taken over"), ("changed", "not quite the same")):
        found = [note for note in draft.notes if note.fate == fate]
        head += [f"# {title}:"] if found else []
        head += [f"#   {said(note)}" for note in found]
    keys = sorted(draft.recipe, key=lambda key: ORDER.index(key) if key in ORDER else len(ORDER))
    body = [_entry(key, draft.recipe[key]) for key in keys]
    return "\n".join([*head, *body]) + "\n"


def said(note: Note) -> str:
    """A note as one line."""
    place = f"line {note.line}: " if note.line else ""
    value = f": {short(note.value)}" if note.value is not None else ""
    return f"{place}{note.key}{value}: {note.what}"


def short(value: Any) -> str:
    """A value of a configuration, on one line."""
    return cut(yaml_word(value).replace("\n", "\\n"), 48)


def _entry(key: str, value: Any) -> str:
    """One top-level key: on one line where it fits, else its own keys below it."""
    line = f"{key}: {_flow(value)}"
    if len(line) <= WIDTH or not isinstance(value, Mapping):
        return line
    rows = []
    for name, item in value.items():
        if isinstance(item, list) and len(_flow(item)) > WIDTH - 4:
            rows += [f"  {name}:", *(f"    - {_flow(part)}" for part in item)]
        else:
            rows.append(f"  {name}: {_flow(item)}")
    return "\n".join([f"{key}:", *rows])


def _flow(value: Any) -> str:
    out: str = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, sort_keys=False, allow_unicode=True)
    return out.removesuffix("\n").removesuffix("\n...")
