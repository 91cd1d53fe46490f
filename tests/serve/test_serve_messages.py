"""What goes between the server and its engine's process arrives as it was sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmkit.inference.request import Event, Request, Token
from llmkit.inference.sampling import Sampling
from llmkit.serve.messages import event_in, event_out, request_in, request_out

TOKEN = Token(0, -0.5, 0.0, {0: -0.5, 7: -1.0})


def sent(value: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(value))
    return made


@pytest.mark.parametrize(
    "event",
    [
        Event("a", 0, ()),
        Event("a", 0, (TOKEN,), "stop", stopped=0),
        Event("a", 1, (TOKEN,), "stop", stopped="", version=3),
        Event("a", 0, (TOKEN, Token(1, None, -2.0)), "error", "it failed", cached=16),
        Event("a", 0, (), prompt=()),
        Event("a", 2, (TOKEN,), prompt=(None, TOKEN)),
    ],
)
def test_an_event_arrives_as_it_was_sent(event: Event) -> None:
    assert event_in(sent(event_out(event))) == event


def test_what_is_as_in_most_events_is_not_sent() -> None:
    assert set(event_out(Event("a", 0, (TOKEN,)))) == {"request", "index", "tokens"}


def test_a_request_arrives_as_it_was_sent() -> None:
    sampling = Sampling(temperature=0.5, stop=("x",), stop_ids=(0,), logit_bias={0: 1.0}, logprobs=0)
    request = Request("a", (0, 1), sampling, "adapter", "tenant", 2)
    got = request_in(sent(request_out(request)))
    assert (got.prompt, got.adapter, got.tenant, got.priority) == (request.prompt, "adapter", "tenant", 2)
    assert got.sampling.stop_ids in ((0,), [0]) and got.sampling.logprobs == 0 and got.sampling.temperature == 0.5
