"""A fault of one rank is a fault of all of them: none is left waiting for one that gave up."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llmkit.core.errors import LlmkitError, ModelError, PeerError, Problem, ResourceError
from llmkit.core.peers import Peers

KINDS = {kind.__name__: kind for kind in (ModelError, PeerError, ResourceError)}


def agree(peers: Peers, fault: BaseException | None) -> None:
    """Called by every rank with what went wrong on it, if anything did.

    Raises:
        LlmkitError: on all ranks, where something did: a rank's own fault, else that of the first that has one.
    """
    said = peers.gather(None if fault is None else as_json(fault, peers.ranks.name if peers.ranks.world > 1 else ""))
    if fault is not None:
        raise fault
    for one in said:
        if one is not None:
            raise from_json(one)


def as_json(fault: BaseException, name: str) -> dict[str, Any]:
    """A fault as other ranks are told of it; `name` says whose it is."""
    problem = fault.problems[0] if isinstance(fault, LlmkitError) else Problem(f"saving failed: {fault!r:.200}")
    what = f"{name}: {problem.what}" if name else problem.what
    kind = type(fault).__name__ if type(fault).__name__ in KINDS else "PeerError"
    return {"kind": kind, "problem": asdict(problem) | {"what": what}}


def from_json(said: dict[str, Any]) -> LlmkitError:
    """The error of another rank."""
    return KINDS[said["kind"]](problems=[Problem(**said["problem"])])
