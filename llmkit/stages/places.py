"""What of this machine must not be published: folders, and logins in addresses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.core.errors import without_logins

HERE = re.compile(r"file:|/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\")
"""How a path of this machine begins."""

PATHS = ("path", "out", "template")
"""Keys of a recipe whose values are files and folders."""


def bare(text: str) -> str:
    """A path's last part; other text without the logins and the queries of addresses, which may hold keys."""
    if HERE.match(text) or ".." in re.split(r"[/\\]", text):
        return re.split(r"[/\\:]", text.rstrip("/\\"))[-1]
    return re.sub(r"(\w://[^\s?#]*)[?#]\S*", r"\1", without_logins(text))


def without_places(value: Any) -> Any:
    """The value as plain JSON has it, each text in it `bare`."""
    if isinstance(value, Mapping):
        return {key: _of_key(key, without_places(item)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    plain = json.loads(json.dumps(value, default=str))
    return bare(plain) if isinstance(plain, str) else plain


def _of_key(key: object, value: Any) -> Any:
    """Where a key says that its value is a path, relative ones are places too."""
    if key not in PATHS or not isinstance(value, str | list):
        return value
    if isinstance(value, list):
        return [_of_key(key, item) for item in value]
    return value if "://" in value else value.rstrip("/").rpartition("/")[2]


def named(base: Mapping[str, Any]) -> dict[str, Any]:
    """`Resolved.facts()` with names in the place of folders."""
    shown = dict(base)
    if base.get("source") == "folder":
        shown["name"] = last_part(str(base.get("name", "")))
    return shown | ({"base": named(base["base"])} if "base" in base else {})


def last_part(path: str) -> str:
    """What a folder is called, however it is written."""
    return Path(path).expanduser().resolve().name


def content(path: Path) -> Path | bytes:
    """A file of a result as it may be published: itself, or what is sent in its place."""
    if path.name not in ("adapter_config.json", "llmkit.json"):
        return path
    said = json.loads(path.read_text("utf-8"))
    if path.name == "llmkit.json":
        said["base"] = named(said["base"])
    else:
        said |= {key: bare(text) for key, text in said.items() if key.endswith("name_or_path") and text}
    return (json.dumps(said, indent=2, sort_keys=True) + "\n").encode()
