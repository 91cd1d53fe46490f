"""The verb that serves a model over HTTP."""

from __future__ import annotations

from pathlib import Path

from llmkit.core.environment import prepare
from llmkit.models.alias import is_remote
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve


def serve(model: str, host: str, port: int, keys: str, name: str) -> None:
    """Serves until it is told to stop."""
    if not Path(model).is_dir():
        resolve(ModelRef(name=model))  # a name that is none is told before the heavy imports
    prepare(remote=is_remote(model))
    from llmkit.serve.start import Settings, start

    start(Settings(ModelRef(name=model), host, port, name, Path(keys) if keys else None))
