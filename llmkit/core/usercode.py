"""Code of the user's own that a recipe names (`ref: ./my.py:score`): it runs where the command line allowed it, once
for each digest of the file."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmkit.core.cache import cache
from llmkit.core.config import Conflict
from llmkit.core.errors import RecipeError
from llmkit.core.files import refused

FIX = "write FILE.py:FUNCTION, such as ./my.py:score"
CLASS = "write FILE.py:CLASS, such as ./my.py:Shop"
PLAIN = (ast.Constant, ast.JoinedStr, ast.List, ast.Tuple, ast.Set, ast.Dict)
"""What is nothing to call, as it is written."""


@dataclass(frozen=True)
class Code:
    """A function in a file that may run."""

    file: Path
    name: str
    text: bytes
    """All of the file, as it was read."""

    @property
    def digest(self) -> str:
        """What it is allowed by."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def wanted(self) -> list[str]:
        """The arguments that it cannot do without, where its file shows them: not of what is decorated or assigned."""
        last = next((node for node in reversed(ast.parse(self.text).body) if self.name in _named(node)), None)
        if not isinstance(last, ast.FunctionDef) or last.decorator_list:
            return []
        given = last.args
        plain = [*given.posonlyargs, *given.args]
        plain = plain[: len(plain) - len(given.defaults)]
        named = [one for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None]
        return [one.arg for one in (*plain, *named)]


def unreadable(ref: str, key: str = "ref", what: str = "function") -> Iterator[Conflict]:
    """What names no function, or no class (`what`), of a file."""
    file, _, name = ref.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        yield Conflict(key, f"{ref!r} names no {what} of a file", FIX if what == "function" else CLASS)


def allowed(ref: str, granted: bool, key: str = "ref") -> Code:
    """The function that `ref` names. What was granted for a file's digest is remembered in the cache.

    Raises:
        RecipeError: the file cannot be read, has no such function, or was not granted.
    """
    code = looked_at(ref, key)
    check_granted(ref, code, granted, key)
    _remember(code)
    return code


def looked_at(ref: str, key: str = "ref") -> Code:
    """The function that `ref` names, of which nothing is run.

    Raises:
        RecipeError: the file cannot be read, or has no such function.
    """
    path, _, name = ref.rpartition(":")
    file = Path(path).expanduser()
    try:
        text = file.read_bytes()
    except OSError as cause:
        raise RecipeError(f"{path} cannot be read ({cause.strerror})", fix=FIX, key=key) from cause
    _check(text, name, path, key)
    return Code(file.absolute(), name, text)


def _check(text: bytes, name: str, path: str, key: str) -> None:
    """Looks for the function without running anything."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError) as cause:
        raise RecipeError(f"{path} is no Python ({cause})", fix="mend it", key=key) from cause
    found = [name for node in body for name in _named(node)]
    if name not in found:
        known = ", ".join(one for one in found if not one.startswith("_"))[:200]
        raise RecipeError(f"{path} has no {name}", fix=f"name one of {known or 'its functions'}", key=key)
    last = next(node for node in reversed(body) if name in _named(node))
    if isinstance(last, ast.Assign | ast.AnnAssign) and isinstance(last.value, PLAIN):
        raise RecipeError(f"{path}: {name} is no function", fix="name a function", key=key)


def _named(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a file gives to something."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def check_granted(ref: str, code: Code, granted: bool, key: str = "ref") -> None:
    """
    Raises:
        RecipeError: nobody allowed the file as it is.
    """
    if not granted and not _note(code).is_file():
        what = f"{ref} runs code of yours (sha256 {code.digest[:12]}), which nobody allowed yet"
        raise RecipeError(what, fix="read it, then run once with --allow-python", key=key)


def _note(code: Code) -> Path:
    return cache() / "allowed-python" / code.digest


def _remember(code: Code) -> None:
    note = _note(code)
    if not note.is_file():
        try:
            note.parent.mkdir(mode=0o700, exist_ok=True)
            note.write_text(f"{code.file}\n", "utf-8")
        except OSError as cause:
            raise refused(cause, "writing", note) from cause
