"""What a user can cause, each with an exit status and one line that names the place, the value and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: printed as `FILE:LINE:COLUMN: KEY: what; fix: one action`; empty parts are left out."""

    what: str
    fix: str = ""
    file: str = ""
    line: int = 0
    column: int = 0
    key: str = ""

    def __str__(self) -> str:
        place = ":".join([self.file, *(str(n) for n in (self.line, self.column) if n)]) if self.file else ""
        text = ": ".join(part for part in (place, self.key, self.what) if part)
        return one_line(without_logins(f"{text}; fix: {self.fix}" if self.fix else text))


class LlmkitError(Exception):
    """The base of all errors that a user can cause; `problems` holds at least one; `code` is the exit status."""

    code: ClassVar[int] = 1
    speaks: bool | None = None
    """Whether this process prints it; None: where it is the main one or, before ranks have met, the first of its host;
    False: it is printed already, or the main one does."""

    def __init__(
        self,
        what: str = "",
        *,
        fix: str = "",
        file: str = "",
        line: int = 0,
        column: int = 0,
        key: str = "",
        problems: Sequence[Problem] = (),
    ) -> None:
        self.problems = tuple(problems) or (Problem(what, fix, file, line, column, key),)
        super().__init__("\n".join(map(str, self.problems)))

    def hide(self, text: str, shown: str) -> None:
        """Puts `shown` in the place of `text`."""
        places = ("what", "fix", "file")
        self.each(
            lambda problem: replace(problem, **{name: getattr(problem, name).replace(text, shown) for name in places})
        )

    def below(self, place: str, top: str = "") -> None:
        """Its keys are below `place`: in it, those that say `top`, and what is below it, say what `place` is."""
        self.each(lambda said: replace(said, key=below(said.key, place, top)))

    def each(self, change: Callable[[Problem], Problem]) -> None:
        """Puts what `change` makes of a problem in the place of each."""
        self.problems = tuple(map(change, self.problems))
        self.args = ("\n".join(map(str, self.problems)),)


class RecipeError(LlmkitError):
    """A recipe or a command line that cannot be carried out (exit 2)."""

    code = 2


class DataError(LlmkitError):
    """Rows that cannot be read or trained on (exit 3)."""

    code = 3


class ModelError(LlmkitError):
    """A model, an adapter, a tokenizer or a checkpoint that cannot be used (exit 4)."""

    code = 4


class ResourceError(LlmkitError):
    """Memory, disk, a device or the numbers themselves gave out (exit 5)."""

    code = 5


class PeerError(LlmkitError):
    """Another process of the same run failed or disagrees (exit 6)."""

    code = 6


class Stopped(LlmkitError):
    """The run was asked to stop and can be continued (exit 75)."""

    code = 75


def below(key: str, place: str, top: str = "") -> str:
    """`key` below `place`: `top`, and what is below it, says what `place` is."""
    rest = key.removeprefix(top) if key == top or key.startswith(f"{top}.") else key
    return f"{place}.{rest.removeprefix('.')}" if rest else place


@contextmanager
def told_below(place: str, top: str = "") -> Iterator[None]:
    """Inside, the keys of errors are below `place`, of which they say `top`."""
    try:
        yield
    except LlmkitError as error:
        error.below(place, top)
        raise


def without_logins(text: str) -> str:
    """`text` without the user and the password of the URLs in it."""
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", "***", text)


def one_line(text: str) -> str:
    """`text` with control characters and lone surrogates escaped, so that it prints as exactly one line."""
    if text.isprintable():  # letter by letter it takes as long as the rest of a line of a log
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
