"""`extends`: one tree over others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmkit.core.convert import under
from llmkit.core.errors import RecipeError
from llmkit.core.scalars import Value
from llmkit.core.wording import Report, text_of
from llmkit.recipe.parse import parse_file

MOST_FILES = 100
ONE_OF = re.compile(r"((stages\.[^.]+|defaults)\.)?batch")
"""Mappings of a stage of which one key is given: together with another of it, it could not be."""


@dataclass
class _Reader:
    """Reads files below a root, and counts them: files that extend each other twice over would be read for ever."""

    root: Path
    report: Report
    read: int = 0


def extended(path: Path, report: Report) -> Value:
    """The tree of a file over the trees that it extends, all below the working folder if the file is, else its own.

    Raises:
        RecipeError: a file cannot be read, lies outside, or extends itself.
    """
    here, cwd = path.resolve(), Path.cwd()
    root = cwd if here.is_relative_to(cwd) else here.parent
    return _tree(path, (), _Reader(root, report))


def _tree(path: Path, chain: tuple[Path, ...], reader: _Reader) -> Value:
    reader.read += 1
    tree = parse_file(path, reader.report)
    if not isinstance(tree.held, dict):
        raise RecipeError("holds no mapping at the top", fix="write `key: value` lines", file=str(path), line=1)
    if "extends" not in tree.held:
        return tree
    said = tree.held["extends"]
    merged = Value({}, tree.origin)
    for name in said.held if isinstance(said.held, list) else [said]:
        other = _checked(name, path, (*chain, path.resolve()), reader)
        merged = _over(merged, _tree(_near(other), (*chain, path.resolve()), reader))
    own = {key: value for key, value in tree.held.items() if key != "extends"}
    return _over(merged, replace(tree, held=own))


def _over(below: Value, above: Value) -> Value:
    """A recipe over what it extends; of one of another kind it would keep nothing."""
    old, new = below.held.get("kind"), above.held.get("kind")
    if old is not None and new is not None and old.held != new.held:
        what = f"is {text_of(new)}, and what it extends is {text_of(old)} ({old.origin})"
        place = (new.origin.file, new.origin.line, new.origin.column)
        raise RecipeError(
            what, fix="extend a recipe of the same kind", key="kind", file=place[0], line=place[1], column=place[2]
        )
    return merge(below, above)


def _checked(name: Value, path: Path, chain: tuple[Path, ...], reader: _Reader) -> Path:
    """The file that `extends` names in `path`."""

    def refused(what: str, fix: str) -> RecipeError:
        origin = name.origin
        return RecipeError(what, fix=fix, file=str(path), line=origin.line, column=origin.column, key="extends")

    if not isinstance(name.held, str) or not name.held:
        raise refused("is not a file or a list of files", "give a path")
    other = (path.parent / name.held).resolve()
    steps = _chain([*chain, other])
    if other in chain:
        raise refused(f"goes in a circle: {steps}", "take one link away")
    if not other.is_relative_to(reader.root):
        raise refused(f"{name.held} lies outside {reader.root.name or reader.root}", "keep recipes in one folder")
    if not other.is_file():
        raise refused(f"{name.held} does not exist ({steps})", "mend the path")
    if reader.read >= MOST_FILES:
        raise refused(f"more than {MOST_FILES} files are read ({steps})", "extend fewer files")
    return other


def _near(path: Path) -> Path:
    """A path as a user would write it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _chain(paths: Sequence[Path]) -> str:
    return " -> ".join(path.name for path in paths)


def merge(below: Value, above: Value, key: str = "") -> Value:
    """`above` over `below`, at the place `key`: mappings merge, all else replaces; a mapping of another kind replaces
    too, and one whose keys say one thing in several ways."""
    if ONE_OF.fullmatch(key) or not isinstance(below.held, dict) or not isinstance(above.held, dict):
        return above
    kinds = [tree.held["kind"].held for tree in (below, above) if "kind" in tree.held]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        return above
    held = dict(below.held)
    for name, value in above.held.items():
        held[name] = merge(held[name], value, under(key, name)) if name in held else value
    return replace(above, held=held, keys={**below.keys, **above.keys}, bare=below.bare)
