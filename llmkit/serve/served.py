"""What the engine's process has: a model, its engine, and what can be asked of them beside requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.build.llm import LLM
from llmkit.inference.engine import Engine


@dataclass
class Served:
    """A model that is served."""

    engine: Engine
    model: Mapping[str, Any]
    """Its name, source, revision and digest."""
    verbs: Mapping[str, Callable[[dict[str, Any]], Any]]
    """What can be called by name, each with what was asked as JSON."""

    def facts(self) -> dict[str, Any]:
        """For the server, when it is ready."""
        known = self.engine.facts
        return {"words": known.words, "longest": known.longest, "ends": known.ends, "model": self.model}

    def stats(self) -> dict[str, Any]:
        """How it does."""
        told = self.engine.stats()
        return {**vars(told), "free": told.blocks - told.used}


def open_served(settings: Mapping[str, Any]) -> Served:
    """Loads what the server's settings name.

    Raises:
        ModelError: it cannot be loaded or run.
    """
    return served_of(LLM(settings["model"], seed=0))


def served_of(llm: LLM) -> Served:
    """What there is to ask of a loaded model."""
    return Served(llm.engine, llm.loaded.resolved.facts(), {})
