"""The verb that serves a model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkit.core.environment import prepare
from llmkit.models.alias import is_remote
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve


def serve(
    model: Annotated[str, typer.Argument(help="An alias, a Hub id, a model folder, or a run's folder.")],
    host: Annotated[str, typer.Option(help="The address that is listened on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[str, typer.Option(help="Keys, one a line; asked for on every route but /health.")] = "",
    name: Annotated[str, typer.Option(help="Under which the model is served; MODEL without it.")] = "",
) -> None:
    """Serve a model over HTTP, as OpenAI's clients speak it."""
    if not Path(model).is_dir():
        resolve(ModelRef(name=model))  # a name that is none is told before the heavy imports
    prepare(remote=is_remote(model))
    from llmkit.serve.start import Settings, start

    start(Settings(ModelRef(name=model), host, port, name, Path(api_key_file) if api_key_file else None))
