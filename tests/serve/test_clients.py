"""OpenAI's own client against the server: what it sends is understood, what it gets it can read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from llmkit.build.llm import LLM
from llmkit.cli.main import _guarded
from llmkit.serve.page import PATHS
from tests.conftest import make_model, make_tokenizer
from tests.serve.conftest import TOOLED, Running

ASKED: list[Any] = [{"role": "user", "content": "hello world"}]
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Bern", "Oslo"]}, "days": {"type": "integer", "maximum": 9,
    "minimum": 0}}, "required": ["city", "days"], "additionalProperties": False}  # fmt: skip
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Running]:
    """Of a model whose template knows tools."""
    folder = tmp_path_factory.mktemp("tools")
    make_model(max_position_embeddings=2048).save_pretrained(folder)
    make_tokenizer(TOOLED).save_pretrained(folder)
    running = Running(LLM(str(folder)))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


class Answer(BaseModel):
    mood: Literal["good", "bad"]
    sure: bool


def test_a_tool_that_must_be_called_is_called_with_arguments_of_its_schema(client: Any) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=ASKED, tools=TOOLS, tool_choice=NAMED, max_tokens=1500, seed=1
    )
    choice = made.choices[0]
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather" and call.id and choice.finish_reason == "tool_calls"
    assert arguments["city"] in ("Bern", "Oslo") and 0 <= arguments["days"] <= 9
    assert choice.message.content is None
    told = [*ASKED, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "4 degrees"}]
    again = client.chat.completions.create(model="tiny", messages=told, tools=TOOLS, tool_choice="none", max_tokens=4)
    assert again.choices[0].message.tool_calls is None and again.choices[0].finish_reason in ("length", "stop")


def test_streamed_calls_put_together_are_the_whole_ones(client: Any) -> None:
    how = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "tool_choice": NAMED, "max_tokens": 1500, "seed": 1}
    whole = client.chat.completions.create(**how).choices[0].message.tool_calls
    with client.chat.completions.stream(**how) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(deltas) > 2 and "".join(one.arguments_delta for one in deltas) == whole[0].function.arguments
    assert final.message.tool_calls[0].function.arguments == whole[0].function.arguments
    assert final.finish_reason == "tool_calls"


def test_structured_output_is_parsed_by_the_client_s_own_model(client: Any) -> None:
    made = client.chat.completions.parse(model="tiny", messages=ASKED, response_format=Answer, max_tokens=1500, seed=2)
    assert isinstance(made.choices[0].message.parsed, Answer)
    plain = client.chat.completions.create(
        model="tiny", messages=ASKED, response_format={"type": "json_object"}, max_tokens=40, seed=3
    )
    assert plain.choices[0].message.content.lstrip().startswith("{")


def test_embeddings_come_as_numbers_and_as_the_client_s_packed_floats(client: Any) -> None:
    packed = client.embeddings.create(model="tiny", input=["hello", "a model"])
    plain = client.embeddings.create(model="tiny", input="hello", encoding_format="float")
    assert [one.index for one in packed.data] == [0, 1] and len(packed.data[0].embedding) == 32
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert packed.usage.prompt_tokens > plain.usage.prompt_tokens > 0


def test_completions_stream_what_they_say_whole(client: Any) -> None:
    how = {"model": "tiny", "prompt": "hello", "max_tokens": 9, "temperature": 0.0, "n": 2}
    whole = client.completions.create(**how)
    said = {0: "", 1: ""}
    for part in client.completions.create(stream=True, **how):
        for choice in part.choices:
            said[choice.index] += choice.text
    assert [choice.text for choice in whole.choices] == [said[0], said[1]] and said[0] == said[1] != ""


def test_errors_are_the_client_s_own_kinds_and_name_the_field(client: Any) -> None:
    def refused(kind: type[openai.APIStatusError], **more: Any) -> Any:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**({"model": "tiny", "messages": ASKED, "max_tokens": 2} | more))
        return caught.value

    assert refused(openai.NotFoundError, model="other").code == "model_not_found"
    assert refused(openai.BadRequestError, temperature=9).param == "temperature"
    assert refused(openai.BadRequestError, tools=[{"type": "x"}]).param == "tools[0]"
    assert refused(openai.BadRequestError, tool_choice="required").param == "tool_choice"
    assert refused(openai.BadRequestError, extra_body={"temprature": 1}).param == "temprature"
    assert refused(openai.BadRequestError, max_tokens=100_000).code == "context_length_exceeded"
    assert "traceback" not in str(refused(openai.BadRequestError, messages=[])).lower()


def test_many_at_once_through_the_asynchronous_client(server: Any) -> None:
    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as own:
            asks = [own.chat.completions.create(model="tiny", messages=ASKED, max_tokens=6, seed=5) for _ in range(12)]
            return [made.choices[0].message.content or "" for made in await asyncio.gather(*asks)]

    assert len(set(asyncio.run(many()))) == 1


def test_the_playground_is_served_with_its_policy(server: Any) -> None:
    with httpx.Client(base_url=server.url) as own:
        for path in PATHS:
            got = own.get(path)
            assert got.status_code == 200 and "default-src 'none'" in got.headers["content-security-policy"]
        assert own.get("/playground/page.py").status_code == 404


def test_the_server_is_measured_by_its_own_verb(server: Any, capfd: Any) -> None:
    words = ["--model", "tiny", "--requests", "6", "--warmup", "1", "--prompt-tokens", "24", "--output-tokens", "6"]
    assert _guarded(["bench", "serve", server.url, *words, "--concurrency", "2", "--json"], False) == 0
    got = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert got["requests"]["done"] == 6 and got["tokens"]["completion"] == 36
    assert got["tokens"]["prompt"] == pytest.approx(6 * 24, rel=0.35)


def test_a_call_that_the_model_makes_by_itself_is_the_client_s_call_whole_and_streamed(client: Any) -> None:
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    how = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "max_tokens": 200, "seed": 4}
    how |= {"extra_body": {"structured_outputs": {"choice": ["Wait. " + call]}}}
    whole = client.chat.completions.create(**how).choices[0]
    assert whole.message.content.strip() == "Wait." and whole.finish_reason == "tool_calls"
    assert [(one.function.name, json.loads(one.function.arguments)) for one in whole.message.tool_calls] == [
        ("now", {})
    ]
    with client.chat.completions.stream(**how) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and final.message.content == whole.message.content
    assert [one.function.name for one in final.message.tool_calls] == ["now"]


def test_structured_output_is_parsed_from_a_stream_and_from_a_response(client: Any) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=ASKED, response_format=Answer, max_tokens=1500, seed=2
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Answer)
    made = client.responses.parse(model="tiny", input="hello", text_format=Answer, max_output_tokens=1500)
    assert isinstance(made.output_parsed, Answer)


def test_models_are_the_client_s_own(client: Any) -> None:
    (one,) = client.models.list()
    assert client.models.retrieve(one.id) == one and one.object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_strangers_and_overload_are_the_client_s_own_kinds(llm: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a" * 32 + " anna rpm=2")
    running = Running(llm, keys=keys)
    try:
        with pytest.raises(openai.AuthenticationError) as stranger:
            openai.OpenAI(base_url=running.url + "/v1", api_key="b" * 32, max_retries=0).models.list()
        assert stranger.value.code == "invalid_api_key"
        own = openai.OpenAI(base_url=running.url + "/v1", api_key="a" * 32, max_retries=0)
        how: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 2}
        for _ in range(2):
            assert own.chat.completions.create(**how).choices
        with pytest.raises(openai.RateLimitError) as often:
            own.chat.completions.create(**how)
        assert 0 < int(often.value.response.headers["retry-after"]) <= 60
    finally:
        running.stop()
