"""What other servers of the same routes promise, in our own words: the table is in docs/clients.md."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

ASKED: list[Any] = [{"role": "system", "content": "Book"}, {"role": "user", "content": "hello world"}]


@pytest.fixture
def http(server: Any) -> Any:
    with httpx.Client(base_url=server.url, timeout=60) as own:
        yield own


def completed(http: httpx.Client, **body: Any) -> list[str]:
    got = http.post("/v1/completions", json={"model": "tiny", "max_tokens": 8} | body)
    assert got.status_code == 200, got.text
    return [choice["text"] for choice in got.json()["choices"]]


def test_tokens_are_as_good_a_prompt_as_their_text_alone_and_in_batches(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "hello world"}).json()["tokens"]
    text = completed(http, prompt="hello world", temperature=0.0)
    assert completed(http, prompt=tokens, temperature=0.0) == text
    assert completed(http, prompt=[tokens, tokens], temperature=0.0) == text * 2
    assert completed(http, prompt=["hello world", tokens], temperature=0.0) == text * 2
    for bad in ([tokens, 7], ["hello", {}], ["hello", []], [1, "hello"], [[1, "hello"]]):
        got = http.post("/v1/completions", json={"prompt": bad})
        assert got.status_code == 400 and got.json()["error"]["param"] == "prompt"


def test_tokens_are_told_with_their_texts(http: httpx.Client) -> None:
    text = "a test with \u5abd and \U0001f917"
    got = http.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    plain = http.post("/tokenize", json={"content": text}).json()["tokens"]
    assert [one["id"] for one in got] == plain and all(one["piece"] for one in got)
    assert http.post("/tokenize", json={"content": text, "add_special": False}).json()["tokens"] == plain
    beside = {"messages": ASKED, "prompt": 0.0}
    for wrong in ({"prompt": 0.0}, {"content": []}, beside, {"content": text, "prompt": 1}, {}):
        refused = http.post("/tokenize", json=wrong)
        assert refused.status_code == 400, wrong
        assert refused.json()["error"]["param"] == ("content" if wrong == {"content": []} else "prompt")


def test_a_seed_repeats_alone_and_among_others_and_others_differ(http: httpx.Client) -> None:
    one = completed(http, prompt="hello", seed=42, temperature=1.0, max_tokens=12)
    assert completed(http, prompt="hello", seed=42, temperature=1.0, max_tokens=12) == one
    many = {completed(http, prompt="hello", seed=seed, temperature=1.0, max_tokens=12)[0] for seed in range(4)}
    assert len(many) == 4


def test_a_prompt_past_the_context_is_refused(http: httpx.Client) -> None:
    got = http.post("/v1/completions", json={"model": "tiny", "prompt": "hello world " * 2000})
    assert got.status_code == 400 and got.json()["error"]["code"] == "context_length_exceeded"


def test_an_answer_goes_on_with_the_last_message(http: httpx.Client) -> None:
    def told(**more: Any) -> httpx.Response:
        return http.post("/v1/chat/completions", json={"temperature": 0.0, "max_tokens": 6, "logprobs": True} | more)

    def said(got: httpx.Response) -> list[float]:
        return [token["logprob"] for token in got.json()["choices"][0]["logprobs"]["content"]]

    on: Any = {"continue_final_message": True, "add_generation_prompt": False}
    talk = [*ASKED, {"role": "assistant", "content": "lazy dog"}]
    whole = {"messages": talk} | on
    parts = [http.post("/tokenize", json=one).json()["tokens"] for one in ({"messages": ASKED}, {"prompt": "lazy dog"})]
    assert http.post("/tokenize", json=whole).json()["tokens"] == [*parts[0], *parts[1]]
    plain = {"prompt": [*parts[0], *parts[1]], "max_tokens": 6, "temperature": 0.0, "logprobs": 0}
    got = http.post("/v1/completions", json=plain).json()["choices"][0]["logprobs"]["token_logprobs"]
    assert said(told(**whole)) == got != said(told(messages=talk))
    for how, which in (
        (on, ASKED),
        (on | {"add_generation_prompt": True}, talk),
        ({"add_generation_prompt": False}, talk),
    ):
        refused = told(messages=which, **how)
        assert refused.status_code == 400 and refused.json()["error"]["param"] in on


BROKEN: list[Any] = [None, "string", [123], [{}], [{"role": 123}], [{"role": "system", "content": 123}]]


@pytest.mark.parametrize("messages", [*BROKEN, [{"content": "hello"}], [ASKED[0], {}]])
def test_messages_that_are_none_are_refused(http: httpx.Client, messages: Any) -> None:
    got = http.post("/v1/chat/completions", json={"messages": messages})
    assert got.status_code == 400 and got.json()["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    "form",
    [{"type": "sound"}, {"type": "json_object", "schema": 123}, {"type": "json_object", "schema": {"type": "hiccup"}},
     {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 123}}},
     {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "hiccup"}}}],
)  # fmt: skip
def test_a_form_that_cannot_be_held_is_refused(http: httpx.Client, form: Any) -> None:
    got = http.post("/v1/chat/completions", json={"messages": ASKED, "response_format": form, "max_tokens": 4})
    assert got.status_code == 400 and "response_format" in got.json()["error"]["param"]


@pytest.mark.parametrize("kind", ["json_schema", "json_object"])
def test_a_constant_is_all_that_its_schema_allows(http: httpx.Client, kind: str) -> None:
    schema = {"schema": {"const": "42"}}
    form = {"type": kind} | ({"json_schema": {"name": "x"} | schema} if kind == "json_schema" else schema)
    body = {"messages": ASKED, "response_format": form, "max_tokens": 40, "seed": 1}
    got = http.post("/v1/chat/completions", json=body).json()
    assert got["choices"][0]["message"]["content"].strip() == '"42"'


def test_a_stream_has_one_id_a_role_first_and_its_end_last(client: Any) -> None:
    parts = list(client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=8, stream=True))
    assert len({part.id for part in parts}) == 1
    assert parts[0].choices[0].delta.role == "assistant"
    assert all(part.choices[0].delta.role is None for part in parts[1:])
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].choices[0].finish_reason in ("stop", "length")


def test_tokens_told_with_their_probabilities_are_the_text(client: Any) -> None:
    how = {
        "model": "tiny",
        "messages": ASKED,
        "max_tokens": 5,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 10,
    }
    whole = client.chat.completions.create(**how).choices[0]
    assert len(whole.logprobs.content) == 5
    for token in whole.logprobs.content:
        assert token.logprob <= 0 and token.bytes is not None and len(token.top_logprobs) == 10
    streamed = [token for part in client.chat.completions.create(stream=True, **how) for token in
                (part.choices[0].logprobs.content if part.choices[0].logprobs else [])]  # fmt: skip
    assert [token.token for token in streamed] == [token.token for token in whole.logprobs.content]


def test_half_letters_are_told_as_their_bytes(client: Any) -> None:
    how: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 40, "logprobs": True}
    text = "a \u5abd \U0001f917"
    made = client.chat.completions.create(**how, extra_body={"structured_outputs": {"choice": [text]}}).choices[0]
    told = made.logprobs.content
    assert b"".join(bytes(token.bytes) for token in told).decode() == made.message.content == text
    assert any(token.token == "\ufffd" for token in told)


def test_a_bias_of_a_hundred_below_is_never_made(http: httpx.Client) -> None:
    (free,) = completed(http, prompt="hello", temperature=0.0)
    tokens = http.post("/tokenize", json={"prompt": free}).json()["tokens"]
    (other,) = completed(http, prompt="hello", temperature=0.0, logit_bias={str(token): -100 for token in tokens})
    assert not set(http.post("/tokenize", json={"prompt": other}).json()["tokens"][:1]) & set(tokens)
