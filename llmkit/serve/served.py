"""What the engine's process has: a model, its engine, and what can be asked of them beside requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from llmkit.build.llm import LLM
from llmkit.inference.engine import Engine

Said = dict[str, Any]


@dataclass
class Served:
    """A model that is served."""

    engine: Engine
    model: Mapping[str, Any]
    """Its name, source, revision and digest."""
    between: Mapping[str, Callable[[Said, Future[Any]], None]] = field(default_factory=dict)
    """What is carried out between two steps: each settles a future, now or later."""
    beside: Mapping[str, Callable[[Said], Any]] = field(default_factory=dict)
    """What may take longer, and goes on beside the steps."""

    def facts(self) -> Said:
        """For the server, when it is ready."""
        known = self.engine.facts
        return {"words": known.words, "longest": known.longest, "ends": known.ends, "model": self.model}

    def stats(self) -> Said:
        """How it does."""
        return dict(vars(self.engine.stats()))


def open_served(settings: Mapping[str, Any]) -> Served:
    """Loads what the server's settings name.

    Raises:
        ModelError: it cannot be loaded or run.
    """
    return served_of(LLM(settings["model"], seed=0))


def served_of(llm: LLM) -> Served:
    """What there is to ask of a loaded model."""
    engine = llm.engine

    def reset(asked: Said, done: Future[Any]) -> None:
        engine.forget()
        done.set_result(True)

    def load(asked: Said) -> Any:
        engine.adapters.load(asked["name"], asked["path"])
        return asked["name"]

    def unload(asked: Said, done: Future[Any]) -> None:
        engine.adapters.unload(asked["name"])
        done.set_result(asked["name"])

    return Served(engine, llm.loaded.resolved.facts(), {"reset": reset, "unload": unload}, {"load": load})
