"""The members of the `generator` union that are not ours, against a small server that does what it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from llmkit.core.convert import convert, wrapped
from llmkit.core.errors import RecipeError, ResourceError
from llmkit.core.wording import Report
from llmkit.inference.generate import TransformersWriter
from llmkit.inference.node import Generator, OpenAi
from llmkit.inference.openai import OpenAiWriter
from llmkit.inference.request import Ask, Prompt, RequestError
from llmkit.inference.sampling import Sampling


class Endpoint:
    """Answers each request by the next of its scripts, and at the end of them with what it was asked."""

    def __init__(self, *scripts: tuple[int, dict[str, str], Any]) -> None:
        self.scripts, self.asked, self.most, self.now = list(scripts), list[Any](), 0, 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.asked.append((self.path, body, self.headers.get("authorization")))
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    status, headers, said = outer.scripts.pop(0) if outer.scripts else (200, {}, echoed(body))
                with outer.lock:
                    outer.now -= 1
                text = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def echoed(body: dict[str, Any]) -> dict[str, Any]:
    text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    one: dict[str, Any] = {"message": {"content": text}} if "messages" in body else {"text": text}
    choices = [one | {"finish_reason": "stop"}] * body["n"]
    return {"choices": choices, "usage": {"prompt_tokens": 7}}


@pytest.fixture
def endpoint() -> Iterator[Any]:
    made = list[Endpoint]()

    def start(*scripts: Any) -> Endpoint:
        made.append(Endpoint(*scripts))
        return made[-1]

    yield start
    for one in made:
        one.server.shutdown()
        one.server.server_close()


def writer(to: Endpoint, waits: list[float], **more: Any) -> OpenAiWriter:
    return OpenAiWriter(OpenAi(url=to.url, model="theirs", key="secret", **more), waits.append)


def test_an_address_without_v1_is_told_to_end_in_it(endpoint: Any) -> None:
    to = endpoint((404, {}, {"error": {"message": "there is no /chat/completions"}}))
    to.url = to.url.removesuffix("/v1")
    with pytest.raises(RequestError, match=r"refuses it \(404: .*; fix: let the url end in /v1"):
        list(writer(to, []).each([Ask(Prompt((1,), "a"), Sampling())]))


@pytest.mark.parametrize("kind", ["openai", "vllm"])
@pytest.mark.parametrize("url", ["127.0.0.1:8124", "localhost/v1", "http:///v1"])
def test_an_address_that_is_none_is_refused_before_anything_is_asked(kind: str, url: str) -> None:
    report = Report()
    convert(Generator, wrapped({"kind": kind, "url": url, "model": "m"}), "generator", report)
    with pytest.raises(
        RecipeError, match=r"generator.url: .* does not begin with http:// or https:// and a host; fix: "
    ):
        report.stop_if_bad()


def test_what_was_said_goes_there_as_it_was_said_and_comes_back_in_order(endpoint: Any) -> None:
    to, waits = endpoint(), list[float]()
    asks = [Ask(Prompt((1,), f"text {i}"), Sampling(seed=i)) for i in range(20)]
    asks += [Ask(Prompt((1,), ({"role": "user", "content": "hi"},)), Sampling(n=2, stop=("x",), temperature=0.5))]
    made = list(writer(to, waits, at_once=3).each(asks))
    assert [one.text for one in made] == [*(f"text {i}" for i in range(20)), "hi"]
    assert len(made[-1].outputs) == 2 and made[0].prompt_tokens == 7 and not waits and to.most <= 3
    route, body, key = next(one for one in to.asked if "messages" in one[1])
    assert (route, key) == ("/v1/chat/completions", "Bearer secret")
    assert body == {
        **{"model": "theirs", "max_tokens": 128, "n": 2, "temperature": 0.5, "top_p": 1.0, "seed": 0, "stop": ["x"]},
        "messages": [{"role": "user", "content": "hi"}],
    }
    assert {route for route, body, _ in to.asked if "prompt" in body} == {"/v1/completions"}


def test_what_passes_is_asked_again_and_what_does_not_is_an_error(endpoint: Any) -> None:
    waits, ask = list[float](), [Ask(Prompt((1,), "a"))]
    to = endpoint((429, {"retry-after": "3"}, {}), (503, {}, {}), (500, {}, b"x"))
    assert next(writer(to, waits).each(ask)).text == "a"
    assert waits[0] == 3.0 and 0.5 <= waits[1] <= 1.0 and 1.0 <= waits[2] <= 2.0
    busy = endpoint(*[(429, {}, {})] * 3)
    with pytest.raises(ResourceError, match=r"generator.url: .* answers 429, 2 times; fix"):
        next(writer(busy, waits, tries=2).each(ask))
    refuses = endpoint((400, {}, {"error": {"message": "too long"}}))
    with pytest.raises(RequestError, match=r"refuses it \(400: too long\)") as refused:
        next(writer(refuses, waits).each(ask))
    assert "secret" not in str(refused.value) and len(refuses.asked) == 1
    with pytest.raises(ResourceError, match="something else than a completion"):
        next(writer(endpoint((200, {}, [1])), waits).each(ask))
    gone = endpoint()
    gone.server.server_close()
    gone.server.shutdown()
    with pytest.raises(ResourceError, match=r"cannot be reached \(\w+\), 2 times"):
        next(writer(gone, waits, tries=2).each(ask))


def test_what_the_routes_have_no_word_for_is_refused_before_anything_is_sent(endpoint: Any) -> None:
    to = endpoint()
    for field, value in {"top_k": 5, "logprobs": 1, "allowed_ids": (3,), "min_tokens": 2}.items():
        with pytest.raises(RequestError, match=rf"{field}: generator openai has no {field}"):
            list(writer(to, []).each([Ask(Prompt((1,), "a"), Sampling(**{field: value}))]))
    moved = Ask(Prompt((1,), "a"), processors=(lambda prompt, made, logits: logits,))
    with pytest.raises(RequestError, match="processors: generator openai runs no functions"):
        list(writer(to, []).each([moved]))
    with pytest.raises(RequestError, match="processors: generator transformers runs no functions"):
        list(TransformersWriter(None, None).each([moved]))
    assert not to.asked
