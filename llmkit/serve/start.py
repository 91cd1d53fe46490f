"""From an operator's settings to a server that runs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from llmkit.core.errors import RecipeError
from llmkit.models.load import read_tokenizer
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.serve.app import App
from llmkit.serve.node import Bounds
from llmkit.serve.remote import Remote
from llmkit.serve.run import listen, run
from llmkit.serve.service import Service

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Settings:
    """What is served, where and to whom."""

    model: ModelRef
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    """Under which it is served; the model's own name without it."""
    keys: Path | None = None
    bounds: Bounds = field(default_factory=Bounds)


def start(settings: Settings) -> None:
    """Serves until a signal.

    Raises:
        LlmkitError: it cannot be served.
    """
    if settings.host not in LOOPBACK and settings.keys is None:
        what = f"{settings.host} can be reached by others, and no key is asked for"
        raise RecipeError(what, fix="give --api-key-file", key="host")
    own = listen(settings.host, settings.port)
    resolved = resolve(settings.model)
    engine = Remote({"model": settings.model.name})
    tokenizer = read_tokenizer(resolved, settings.model)
    service = Service(settings.name or settings.model.name, engine, tokenizer, settings.bounds)
    app = App(service)
    asyncio.run(run(app.asgi(), own, engine, settings.bounds, lambda: 0, lambda: None))
