"""What the engine's process has: a model, its engine, and what can be asked of them beside requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmkit.build.adapters_of import Beside
from llmkit.build.exactness import exactness
from llmkit.build.held import Here
from llmkit.build.precision import reading
from llmkit.build.renewed import renewal
from llmkit.build.spread import Held, held
from llmkit.core.errors import LlmkitError, ModelError
from llmkit.inference.adapters import inside
from llmkit.inference.engine import Engine
from llmkit.inference.node import OwnEngine
from llmkit.inference.request import RequestError
from llmkit.inference.update import FORESEEN
from llmkit.models.load import Loaded
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.serve.embedding import Text

Said = dict[str, Any]


@dataclass
class Served:
    """A model that is served."""

    engine: Engine
    held: Held
    """What the engine runs."""
    between: Mapping[str, Callable[[Said, Future[Any]], Iterator[None] | None]] = field(default_factory=dict)
    """What is carried out between two steps: each settles a future, now or later, or in the parts that it gives."""
    beside: Mapping[str, Callable[[Said], Any]] = field(default_factory=dict)
    """What may take longer, and goes on beside the steps."""
    exact: str = ""
    """Whether an answer depends on those beside it."""
    speculation: str = ""
    """The kind of what drafts, if anything does."""

    def facts(self) -> Said:
        """For the server, when it is ready."""
        known = self.engine.facts
        said = {"words": known.words, "longest": known.longest, "ends": known.ends}
        said |= {"model": self.held.loaded.resolved.facts(), "exact": self.exact}
        return said | {"adapters": self.engine.adapters.names, "speculation": self.speculation}

    def stats(self) -> Said:
        """How it does."""
        return dict(vars(self.engine.stats()))


def open_served(settings: Mapping[str, Any]) -> Served:
    """Loads what the server's settings name.

    Raises:
        ModelError: it cannot be loaded or run.
        RequestError: weights that were put in the place of its own before are gone.
    """
    device, ref = "cuda" if torch.cuda.is_available() else "cpu", ModelRef(**settings["model"])
    kinds, resolved = reading(settings["precision"], device), resolve(ref)
    root = Path(settings["root"]) if settings["root"] else None
    beside = Beside(settings["adapters"], root, settings["most_adapters"])
    how, code = OwnEngine(**settings["engine"]), bool(settings["allow_code"])
    served = served_over(held(resolved, ref, kinds, device, how, beside, allow_code=code), how, root)
    for name, path in settings["loaded"].items():  # what was loaded before the last one died
        with suppress(LlmkitError):  # its folder is gone: that must keep nobody from being served; the facts tell it
            served.engine.adapters.load(name, path)
    if (last := settings.get("weights")) is not None:  # the last that answered: others would be taken for them
        path, served.engine.version = last
        renewal(served.held.loaded.model, inside(root, path, "path"))()
    return served


def served_of(loaded: Loaded, how: OwnEngine = OwnEngine(), beside: Beside = Beside()) -> Served:
    """What there is to ask of a loaded model.

    Raises:
        ModelError: the engine cannot run it, or an adapter does not fit.
    """
    return served_over(Here(loaded, beside=beside), how, beside.root)


def served_over(model: Held, how: OwnEngine, root: Path | None = None) -> Served:
    """The same of one that lies wherever it does; `root`: under it weights and adapters may be loaded by path.

    Raises:
        ModelError: the engine cannot run it, or an adapter does not fit.
    """
    engine = model.engine(how)
    work = Work(engine, model, root)
    between = {"embed": work.embed, "reset": work.reset, "unload": work.unload, "weights": work.weights}
    exact = exactness(model.model, how)
    drafts = "" if how.speculation is None else how.speculation.kind
    return Served(engine, model, between, {"load": work.load}, exact, drafts)


@dataclass
class Work:
    """What admins ask for."""

    engine: Engine
    held: Held
    root: Path | None

    def embed(self, asked: Said, done: Future[Any]) -> Iterator[None]:
        """The mean of a text's last hidden states, or the last of them, of length 1. A long one is read in parts, each
        of what a step may have, or of half of that where answers wait for it; other weights have it begin again.

        Raises:
            RequestError: a device has no memory for so long a text.
        """
        engine, whole = self.engine, self.engine.adapters.whole
        ids = [*range(engine.facts.words, engine.facts.words + whole.before), *asked["prompt"]]
        version = -1
        while True:
            if engine.version != version:
                text, version = Text(engine.runner.forward, ids, whole.before, whole.key), engine.version
            with self.held.computing():
                text.advance(self._part(len(ids)))
            if text.done:
                break
            yield
        done.set_result(text.vector(asked["pooling"]))

    def _part(self, whole: int) -> int:
        """Tokens that are read at once; processes that hold a model together keep nothing of a text in between."""
        most = self.engine.scheduler.limits.tokens
        if self.held.apart:
            return whole
        return most if self.engine.idle else max(1, most // 2)

    def reset(self, asked: Said, done: Future[Any]) -> None:
        """The prefix cache is emptied."""
        self.engine.forget()
        done.set_result(True)

    def load(self, asked: Said) -> str:
        """An adapter of a folder under the root."""
        self.engine.adapters.load(asked["name"], asked["path"])
        return str(asked["name"])

    def unload(self, asked: Said, done: Future[Any]) -> None:
        """No request gets it from now on."""
        self.engine.adapters.unload(asked["name"])
        done.set_result(asked["name"])

    def weights(self, asked: Said, done: Future[Any]) -> None:
        """Weights of a folder under the root, once what runs has ended.

        Raises:
            RequestError: they do not lie in one place.
        """
        if self.held.apart:
            what = f"weights are replaced where they lie whole, and {self.held.apart}"
            raise RequestError(what, fix="start the server again with the others", key="path")
        work = renewal(self.held.loaded.model, inside(self.root, asked["path"], "path"))

        def carry_out() -> None:
            try:
                work()
            except FORESEEN as cause:
                done.set_exception(ModelError(str(cause), key="path"))
                raise
            done.set_result(self.engine.version + 1)

        self.engine.update(carry_out)
