"""What is told of an answer: arguments as they come, thoughts without tools, the bytes of half letters; whole and in a
stream alike."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from llmkit.inference.request import Event, Finish, Request, Token
from llmkit.inference.said.choice import chosen
from llmkit.inference.said.events import CallArguments, Message, message
from llmkit.inference.said.formats import TOOLS, Format
from llmkit.inference.said.parser import Parser, whole
from llmkit.inference.sampling import Sampling
from llmkit.serve.caller import Caller
from llmkit.serve.chat import Chat
from llmkit.serve.chat_told import ChatWriter
from llmkit.serve.fields import Fields
from llmkit.serve.generated import Account, Generation
from llmkit.serve.prompts import prompts
from llmkit.serve.refusal import Refusal
from llmkit.serve.remote import Remote
from llmkit.serve.responses import TOLD, Asked
from llmkit.serve.responses_told import ResponseWriter
from llmkit.serve.service import Service
from llmkit.serve.told import Spelling
from tests.conftest import make_tokenizer
from tests.serve.answers import FORMATS, GOOD, OBJECT, OFFERED

TOOLS_ASKED = [{"type": "function", "function": {"name": name, "parameters": one}} for name, one in OFFERED.items()]
AS_THEY_COME = sorted(set(GOOD) - {"pythonic", "forced"})
"""Formats whose calls are read as they come; Python's are short, and known when they are whole."""


@pytest.mark.parametrize("name", AS_THEY_COME)
def test_arguments_come_as_they_are_made_and_are_those_of_the_whole(name: str) -> None:
    parser = chosen(TOOLS_ASKED).parser(FORMATS[name])
    fed = [parser.feed(c) for c in GOOD[name]]
    events = [event for some in fed for event in some] + parser.finish()
    assert message(events) == whole(GOOD[name], FORMATS[name], OFFERED)
    first = [
        at for at, some in enumerate(fed) for event in some if isinstance(event, CallArguments) and not event.index
    ]
    assert len(first) > 20 and first[0] < first[-1] - 20


def test_what_breaks_off_is_a_call_that_is_not_whole_and_ends_no_answer_by_a_call() -> None:
    for name in AS_THEY_COME:
        cut = GOOD[name][: GOOD[name].index("rich")]  # within its first argument
        parser = chosen(TOOLS_ASKED).parser(FORMATS[name])
        got = message([*parser.feed(cut), *parser.finish()])
        assert [(one.name, one.whole) for one in got.calls] == [("get_weather", False)], name
        assert "Z" in got.calls[0].arguments
    said = asyncio.run(ChatWriter(Scripted(HERMES), asked("<tool_call>" + OBJECT[:50])).whole())["choices"][0]
    assert said["finish_reason"] == "stop" and said["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    good = asyncio.run(ChatWriter(Scripted(HERMES), asked(GOOD["hermes"])).whole())["choices"][0]
    assert good["finish_reason"] == "tool_calls"  # the control
    told = asyncio.run(ResponseWriter(Scripted(HERMES), response("<tool_call>" + OBJECT[:50])).whole())
    assert told["parallel_tool_calls"] is False  # as it was asked
    assert [item["status"] for item in told["output"] if item["type"] == "function_call"] == ["incomplete"]


def test_what_names_no_tool_or_argues_nothing_stays_text() -> None:
    """Nothing was told of it yet."""
    for text in (
        "<tool_call>" + OBJECT.replace("get_weather", "rm"),
        '<tool_call>{"name": "now"',
        "<function=now> is it",
    ):
        parser = chosen(TOOLS_ASKED).parser(FORMATS["qwen3_coder"])
        assert message([*parser.feed(text), *parser.finish()]) == Message(text, "", ())


def test_texts_of_tags_lose_the_same_line_breaks_however_they_are_told() -> None:
    rng = random.Random(5)
    for _ in range(400):
        value = "".join(rng.choice('\n\n<a/"\\p ') for _ in range(rng.randrange(8)))
        text = f"<tool_call><function=get_weather><parameter=city>{value}</parameter></function></tool_call>"
        once = whole(text, FORMATS["qwen3_coder"], OFFERED)
        parser = Parser(FORMATS["qwen3_coder"], OFFERED, eager=True)
        events = [event for c in text for event in parser.feed(c)] + parser.finish()
        assert message(events) == once and len(once.calls) == 1
        assert json.loads(once.calls[0].arguments) == {"city": value.removeprefix("\n").removesuffix("\n")}


HERMES = "{{ '<tool_call>' }} </think> {% for m in messages %}{{ m.content }}{% endfor %}"


class Scripted(Service):
    """A service whose engine says what it is given."""

    def __init__(self, template: str, marks: Sequence[str] = ()) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        tokenizer.add_tokens(list(marks), special_tokens=True)
        super().__init__("m", engine=None, tokenizer=tokenizer)

    def fingerprint(self, version: int) -> str:
        return "fp"

    async def events(
        self, requests: Sequence[Request], caller: Caller, *_: Any
    ) -> AsyncGenerator[tuple[int, Event], None]:
        ids = self.tokenizer.encode(requests[0].tenant, add_special_tokens=False)
        for at, id in enumerate(ids):
            finish = "stop" if at == len(ids) - 1 else None
            top = {id: -0.5, (id + 1) % 256: -1.5}
            yield 0, Event(requests[0].id, 0, (Token(id, -0.5, -0.5, top),), finish, stopped="x" if finish else None)


def asked(text: str, tools: Any = TOOLS_ASKED, logprobs: bool = False) -> Chat:
    """`text` is what will be answered."""
    caller = Caller("", "r", "1")
    request = Request("1", (1,), Sampling(max_tokens=500), tenant=text)
    return Chat(request, Account(caller, "m", "", "", {}), False, False, logprobs, chosen(tools), False)


def response(text: str, logprobs: bool = False) -> Asked:
    return Asked(asked(text, logprobs=logprobs), dict.fromkeys(TOLD) | {"parallel_tool_calls": False})


def both(service: Service, chat: Any) -> dict[str, Any]:
    """The message, which is the same whole and streamed."""

    async def run() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        one = await ChatWriter(service, chat()).whole()
        return one["choices"][0], [part async for part in ChatWriter(service, chat()).parts()]

    once, parts = asyncio.run(run())
    made: dict[str, Any] = {"content": "", "reasoning_content": ""}
    for part in parts:
        delta = part["choices"][0]["delta"]
        for key in made:
            made[key] += delta.get(key, "")
    said = once["message"]
    assert made == {"content": said["content"], "reasoning_content": said.get("reasoning_content", "")}
    assert parts[-1]["choices"][0]["finish_reason"] == once["finish_reason"]
    return once


MISTRAL = ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[INST]")
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")


@pytest.mark.parametrize("tools", [None, TOOLS_ASKED], ids=["no tools", "tools"])
def test_thoughts_in_special_tokens_are_told_apart_with_tools_and_without(tools: Any) -> None:
    service = Scripted("{{ '[INST]' }} [/THINK] [TOOL_CALLS]", MISTRAL)
    said = both(service, lambda: asked("[THINK]hm, so[/THINK]yes", tools))["message"]
    assert (said["reasoning_content"], said["content"]) == ("hm, so", "yes")
    service = Scripted("<|channel|>", HARMONY)
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>"
    said = both(service, lambda: asked(text, tools))["message"]
    assert (said["reasoning_content"], said["content"]) == ("hm", "yes")


def test_other_special_tokens_have_no_text_without_tools() -> None:
    service = Scripted("{{ '[INST]' }} [/THINK] [TOOL_CALLS]", MISTRAL)
    assert both(service, lambda: asked("[INST]yes[TOOL_CALLS]", None))["message"]["content"] == "yes"
    service = Scripted("</think>", ("<think>", "</think>", "<|x|>"))
    said = both(service, lambda: asked("<think>hm</think><|x|>yes", None))["message"]
    assert (said["reasoning_content"], said["content"]) == ("hm", "yes")


def test_the_bytes_of_tokens_put_together_are_those_of_the_text() -> None:
    text = "a \U0001f600é\u4e2d<|im_end|> b"
    said = both(Scripted(HERMES), lambda: asked(text, None, logprobs=True))
    told = said["logprobs"]["content"]
    assert bytes(byte for one in told for byte in one["bytes"]).decode() == text
    halves = [one for one in told if "\ufffd" in one["token"]]
    assert len(halves) >= 3 and all(one["bytes"] != list("\ufffd".encode()) for one in halves)
    for one in told:
        assert one["top_logprobs"][0]["bytes"] == one["bytes"]
        assert one in halves or one["token"].encode() == bytes(one["bytes"])


def test_the_tokens_of_a_response_s_text_are_told_with_it_and_those_of_thoughts_are_not() -> None:
    service = Scripted("{{ '[INST]' }} [/THINK] [TOOL_CALLS]", MISTRAL)

    async def run() -> list[dict[str, Any]]:
        writer = ResponseWriter(service, response("[THINK]hm, so[/THINK]yes \U0001f600", logprobs=True))
        return [event async for event in writer.parts()]

    events = asyncio.run(run())
    (message,) = [item for item in events[-1]["response"]["output"] if item["type"] == "message"]
    told = message["content"][0]["logprobs"]
    assert bytes(byte for one in told for byte in one["bytes"]).decode() == "yes \U0001f600"
    assert all(len(one["top_logprobs"]) == 2 for one in told)
    kind = "response.output_text."
    assert [one for event in events if event["type"] == kind + "delta" for one in event["logprobs"]] == told
    assert [event["logprobs"] for event in events if event["type"] == kind + "done"] == [told]
    begun = [event["part"] for event in events if event["type"] == "response.content_part.added"]
    assert begun[-1]["logprobs"] == []


def test_half_letters_of_completions_are_told_apart_by_their_bytes() -> None:
    tokenizer = make_tokenizer()
    spelling = Spelling(tokenizer)
    ids = tokenizer.encode("\U0001f600", add_special_tokens=False)
    tokens = [Token(id, -1.0, -1.0, dict.fromkeys(ids, -1.0)) for id in ids]
    told = spelling.completion(tokens, ids, 0, 5)
    assert len(set(told["tokens"])) == len(ids) == len(told["top_logprobs"][0]) > 1
    assert told["tokens"][0] == "bytes:\\xf0" and set(told["top_logprobs"][0]) == set(told["tokens"])


def pieces() -> Any:
    """A tokenizer after SentencePiece, with bytes for what it has no pieces for."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581a", "b"]
    own = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    own.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")


def test_the_bytes_of_pieces_have_their_space_and_their_byte() -> None:
    spelling = Spelling(pieces())
    assert [spelling.bytes(id) for id in (258, 259, 257, 1 + 0xC3, 0)] == [b" a", b"b", b" ", b"\xc3", b"<unk>"]
    assert (spelling.text(258), spelling.text(1 + 0xC3), spelling.name(1 + 0xC3)) == (" a", "\ufffd", "bytes:\\xc3")


def test_no_format_is_left_out_here() -> None:
    assert set(TOOLS) - {"none", "pythonic"} == set(AS_THEY_COME)
    assert Format(TOOLS["none"]).shown(True) == ()


class Two(Scripted):
    """Its first answer ends before its second."""

    async def events(
        self, requests: Sequence[Request], caller: Caller, *_: Any
    ) -> AsyncGenerator[tuple[int, Event], None]:
        ends: tuple[tuple[int, Finish | None], ...] = ((0, None), (0, "stop"), (1, None), (1, "length"))
        for index, finish in ends:
            yield index, Event(requests[0].id, index, (Token(5, -0.5, -0.5, {}),), finish)


@pytest.mark.parametrize(("taken", "finish"), [(3, "abort"), (4, "length")])
def test_who_leaves_before_all_answers_have_ended_has_given_them_up(taken: int, finish: str) -> None:
    async def leave() -> str:
        request = Request("1", (1,), Sampling(max_tokens=500, n=2))
        account = Account(Caller("", "r", "1"), "m", "", "", {})
        pieces = Generation(Two(HERMES), [request], account).pieces()
        for _ in range(taken):
            await anext(pieces)
        await pieces.aclose()
        return account.finish

    assert asyncio.run(leave()) == finish


def test_before_the_vocabulary_is_known_no_token_is_said_to_be_none_of_it() -> None:
    service = Service("m", Remote({}), make_tokenizer())
    with pytest.raises(Refusal) as refused:
        asyncio.run(prompts(service, Fields({"prompt": [5, 6]}), "prompt", 1))
    assert (refused.value.status, refused.value.wait) == (503, 2)
