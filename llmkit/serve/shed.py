"""What there is no room for is refused before its body is read or a route looked for: it must cost next to nothing."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from llmkit.serve import reply
from llmkit.serve.gate import Gate
from llmkit.serve.idempotent import key_of
from llmkit.serve.refusal import Refusal


class Shed:
    """Around an application."""

    def __init__(self, app: ASGIApp, gate: Gate, paths: Collection[str]) -> None:
        """`paths`: those whose requests take room."""
        self.app, self.gate, self.paths = app, gate, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. What is asked with an idempotency key may have been answered already, which takes no room."""
        taking = scope["method"] == "POST" and scope["path"] in self.paths
        if taking and not key_of(scope):
            try:
                self.gate.check(scope["caller"])
            except Refusal as refusal:
                await reply.error(reply.noted(scope, refusal))(scope, receive, send)
                return
        await self.app(scope, receive, send)
