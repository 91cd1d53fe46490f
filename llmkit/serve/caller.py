"""Who asks."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.serve.keys import Key


@dataclass(frozen=True)
class Caller:
    """One request's client."""

    tenant: str = ""
    id: str = ""
    """Of the request, in logs and in the answer's headers; a client may name it."""
    number: str = ""
    """Of the request, in the engine: nobody else can know it."""
    key: Key | None = None
    deadline: float | None = None
    """Seconds after which nobody waits for it, where a header says so."""
