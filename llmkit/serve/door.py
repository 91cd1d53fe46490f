"""What every request passes before any route is looked for: its name in logs, its key, whether any are still taken."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.serve import reply
from llmkit.serve.caller import Caller
from llmkit.serve.hosts import Hosts
from llmkit.serve.keys import Key, find, read_keys
from llmkit.serve.refusal import Refusal
from llmkit.serve.service import Service

OPEN = b"/health"
"""The one path that asks for no key."""
DEADLINE = b"x-deadline"
"""How many seconds a client waits; the field `deadline` of its body says the same, and goes before it."""
SECONDS = re.compile(r"[0-9]{1,5}(\.[0-9]{1,9})?")
ID = re.compile(r"[A-Za-z0-9_.:\-]{1,64}")


class Door:
    """Around an application."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        keys: Path | None = None,
        open_paths: Iterable[bytes] = (),
        hosts: Iterable[str] = (),
    ) -> None:
        """`keys`: a file of them; without it nobody is asked for one, and no name but this machine's own and `hosts` is
        answered to. `open_paths`: those that need no key either."""
        self.app, self.service, self.path = app, service, keys
        self.keys: tuple[Key, ...] = ()
        self.tenants = 1
        """How many there are."""
        self.read_again()
        self.open = {OPEN, *open_paths}
        self.hosts = Hosts(hosts)
        self.inside = 0
        """Requests that were let in and are not over."""
        self.over: list[Callable[[Caller, Scope, int, float], None]] = []
        """Told of each that ends: its status, and its seconds."""

    def read_again(self) -> None:
        """The file of keys is new, or has changed.

        Raises:
            RecipeError: it is no file of keys; those that there were stay.
        """
        if self.path is not None:
            self.keys = read_keys(self.path)
            self.tenants = len({key.tenant for key in self.keys})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        begun, told = time.monotonic(), {"status": 499}
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        caller = Caller("", _name(headers.get(b"x-request-id", "")), secrets.token_hex(12))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                told["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", caller.id.encode())]
            await send(message)

        try:
            caller = self._admitted(scope, headers, caller)
        except Refusal as refusal:
            await reply.error(reply.noted(scope, refusal))(scope, receive, answer)
        else:
            scope["caller"] = caller
            self.inside += 1
            try:
                await self.app(scope, receive, answer)
            finally:
                self.inside -= 1
        finally:
            for each in self.over:
                each(caller, scope, told["status"], time.monotonic() - begun)

    def _admitted(self, scope: Scope, headers: dict[bytes, str], caller: Caller) -> Caller:
        """Decided by the path as it was sent: however a route's name may be written, it asks for a key."""
        raw = scope.get("raw_path", b"")
        if self.path is None and raw != OPEN:
            self.hosts.check(scope["method"], scope["headers"])
        if self.path is not None and raw not in self.open:
            key = find(self.keys, headers.get(b"authorization", ""))
            if key is None:
                raise Refusal(401, "no valid key: send `Authorization: Bearer KEY`", code="invalid_api_key")
            caller = replace(caller, tenant=key.tenant, key=key)
            if scope["method"] == "POST":
                self.service.meter.take(key, {"rpm": 1})
        if self.service.draining and raw not in self.open:
            raise Refusal(503, "the server is being stopped", code="draining", wait=5)
        return replace(caller, deadline=_seconds(headers.get(DEADLINE)))


def _seconds(said: str | None) -> float | None:
    """Of the header that says how long a client waits."""
    if said is None:
        return None
    if not SECONDS.fullmatch(said):
        raise Refusal(400, "x-deadline: is no number of seconds", key="x-deadline", code="invalid_value")
    return float(said)


def _name(said: str) -> str:
    return said if ID.fullmatch(said) else "req_" + secrets.token_hex(12)
