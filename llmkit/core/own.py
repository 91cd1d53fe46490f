"""Code of the user's own that runs in this process: as it was allowed when a run began, and named for what it does
wrong. What may hang or crash runs in a process of its own instead (`rl/workers.py`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import TracebackType
from typing import Any, NoReturn, Protocol

from llmkit.core.errors import LlmkitError, RecipeError
from llmkit.core.memory import is_out_of_memory
from llmkit.core.usercode import Code, allowed

MODULE = "llmkit_user_code"


class OwnError(RecipeError):
    """What code of the user's own did wrong."""


class Escape(Protocol):
    """A recipe node that runs code of the user's own in this process."""

    @property
    def ref(self) -> str:
        """FILE.py:NAME."""
        ...

    def begin(self, own: Own) -> None:
        """Sees to it, before anything else is begun, that what `ref` names does what it is asked for.

        Raises:
            OwnError: it does not.
        """
        ...


@dataclass(frozen=True)
class Own:
    """A function or a class of the user's own, ready."""

    ref: str
    key: str
    """The recipe's, that names it."""
    code: Code
    made: Callable[..., Any]

    def __call__(self, *given: Any) -> Any:
        """Calls it."""
        return self.run(self.made, *given)

    def run(self, function: Callable[..., Any], *given: Any) -> Any:
        """Calls a function of its, such as a method of an object that it made.

        Raises:
            OwnError: it failed.
        """
        with _blamed(self.ref, self.key, self.code, "raised"):
            return function(*given)

    def wrong(self, what: str, fix: str) -> NoReturn:
        """Says what it gave that is not what was asked for.

        Raises:
            OwnError: this.
        """
        raise OwnError(f"{self.ref} {what}", fix=fix, key=self.key)


def begun(node: Escape, granted: bool, key: str) -> None:
    """Reads what a node runs and tries it; until this is asked again the node runs that, whatever its file holds.

    Raises:
        RecipeError: it may not run, or does not do what it is asked for.
    """
    own = _opened(node.ref, granted, key)
    node.begin(own)
    vars(node)["_own"] = own  # no field: two recipes that name one file are alike


def own_of(node: Escape) -> Own:
    """What a node runs.

    Raises:
        OwnError: it was not begun: what its file holds by now nobody may have read.
    """
    own: Own | None = vars(node).get("_own")
    if own is None:
        raise OwnError(f"{node.ref} was not begun", fix="run its recipe by llmkit.run", key="ref")
    return own


@contextmanager
def at(place: str) -> Iterator[None]:
    """Inside, what code of the user's own does wrong is told with its place in the run."""
    try:
        yield
    except OwnError as error:
        error.each(lambda said: replace(said, what=f"{place}: {said.what}"))
        raise


def _opened(ref: str, granted: bool, key: str) -> Own:
    code = allowed(ref, granted, key)
    with _blamed(ref, key, code, "fails as it is read:"):
        made = loaded(code)
    if not callable(made):
        raise OwnError(f"{ref} is {type(made).__name__}, and nothing to call", fix="name a function", key=key)
    return Own(ref, key, code, made)


def loaded(code: Code) -> Any:
    """What the code is named for; its file may import from its own folder."""
    name, folder = f"{MODULE}_{code.digest[:12]}", str(code.file.parent)
    spec = spec_from_loader(name, Held(name, code))
    if spec is None or spec.loader is None:
        raise ImportError(str(code.file))
    module = sys.modules[name] = module_from_spec(spec)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)  # half of it is none: who asks again is told again
        raise
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:  # what is imported late, by libraries too, is looked for there last
            sys.path.append(folder)
    return getattr(module, code.name)


class Held(SourceFileLoader):
    """Loads the bytes that were allowed, whatever the file holds by now."""

    def __init__(self, name: str, code: Code) -> None:
        super().__init__(name, str(code.file))
        self.code = code

    def get_data(self, path: str) -> bytes:
        """Those bytes; there is no compiled file."""
        return self.code.text

    def path_stats(self, path: str) -> Any:
        """None, so that nothing compiled is looked for or left."""
        raise OSError(f"{path} is held")


@contextmanager
def _blamed(ref: str, key: str, code: Code, doing: str) -> Iterator[None]:
    """Raises: OwnError for whatever is raised inside, but for errors of ours and memory that gave out."""
    try:
        yield
    except (Exception, SystemExit) as cause:
        if isinstance(cause, LlmkitError) or is_out_of_memory(cause):
            raise
        why = " ".join(str(cause).split())[:200]
        what = f"{ref} {doing} {type(cause).__name__}: {why} ({_place(cause.__traceback__, str(code.file))})"
        raise OwnError(what, fix="mend it", key=key) from cause


def _place(trace: TracebackType | None, file: str) -> str:
    """The last line of the file that it came from, or the last line at all."""
    lines = list[tuple[str, int]]()
    while trace is not None:
        lines.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    name, line = next((one for one in reversed(lines) if one[0] == file), lines[-1])
    return f"{name}:{line}"
