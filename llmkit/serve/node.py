"""What an operator sets: nodes of `kind: serve`, and of the flags of `llmkit serve`."""

from __future__ import annotations

from llmkit.core.config import Duration, Size, config, setting

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Addresses that only this machine reaches."""


@config
class Bounds:
    """What one server takes on at most; whatever is past a bound is refused at once, with its name."""

    requests: int = setting(default=256, least=1)
    """Answers that wait or are being made, over all clients."""
    tokens: int = setting(default=262_144, least=1)
    """Tokens of their prompts together."""
    share: float = setting(default=0.5, above=0.0, most=1.0)
    """What of both one tenant may hold, where there are several."""
    body: Size = setting(default=4 << 20, least=1024)
    """Bytes of a request's body."""
    header: Size = setting(default=32 << 10, least=1024)
    """Bytes of its head: the path and the headers."""
    n: int = setting(default=16, least=1)
    """Answers to one prompt."""
    prompts: int = setting(default=64, least=1)
    """Prompts of one request."""
    max_tokens: int | None = setting(default=None, least=1)
    """Tokens of one answer; left out, what the model has room for."""
    length: int | None = setting(default=None, least=2)
    """Tokens of a prompt and its answer together; left out, what the model and its cache have room for."""
    logprobs: int = setting(default=20, least=0)
    """Likeliest tokens told at each place."""
    categories: int = setting(default=32, least=0)
    """Names of `metadata.category` that are counted apart in `/metrics`; those that come later are `other`."""
    connections: int = setting(default=1024, least=1)
    """Connections at once."""
    receive: Duration = setting(default=30.0, above=0.0)
    """Time for a client to send its request."""
    stall: Duration = setting(default=30.0, above=0.0)
    """Time in which a client that reads nothing is let go."""
    deadline: Duration | None = setting(default=None, above=0.0)
    """Time for a request whose client names none."""
    drain: Duration = setting(default=60.0, least=0.0)
    """Time to finish what was accepted, once the server is told to stop."""
