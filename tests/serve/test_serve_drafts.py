"""Drafts as clients and operators see them: counted, foretold, switched off; what is said is the same."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import httpx
import pytest

from llmkit.inference.cache import Cache
from llmkit.inference.node import OwnEngine
from llmkit.inference.request import Request
from llmkit.inference.speculation.node import Ngram
from llmkit.serve.bench.drive import drive
from llmkit.serve.bench.http import Endpoint
from llmkit.serve.bench.load import Load, from_file, repeated
from llmkit.serve.bench.summary import summary
from llmkit.serve.fields import Fields
from llmkit.serve.foretold import Categories, category
from llmkit.serve.messages import request_in, request_out
from llmkit.serve.node import Bounds
from llmkit.serve.refusal import Refusal
from llmkit.serve.remote import Remote
from tests.serve.conftest import Running

REPEATS = {"prompt": "hello world hello world hello", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
DRAFTING = OwnEngine(cache=Cache(size=8 << 20), speculation=Ngram(tokens=4, fixed=True))


@pytest.fixture(scope="module")
def drafting(llm: Any) -> Any:
    running = Running(llm, engine=DRAFTING, bounds=Bounds(categories=2))
    yield running
    running.stop()


def post(server: Any, route: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    said = httpx.post(server.url + route, json=body, timeout=60)
    assert said.status_code == 200, said.text
    made: dict[str, Any] = said.json()
    return made


def chat(server: Any, **body: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    return post(server, "/v1/chat/completions", **asked | body)


def details(said: dict[str, Any]) -> tuple[int, int]:
    """Drafts that were kept, and those that were not."""
    found = said["usage"]["completion_tokens_details"]
    return found["accepted_prediction_tokens"], found["rejected_prediction_tokens"]


def counted(server: Any) -> dict[str, float]:
    """Each number of `/metrics` by its name and labels."""
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_answers_tell_what_was_drafted_and_are_the_same(server: Any, drafting: Any) -> None:
    plain, said = post(server, **REPEATS), post(drafting, **REPEATS)
    assert said["choices"] == plain["choices"]
    kept, lost = details(said)
    assert details(plain) == (0, 0) and kept > 4 and lost >= 0
    lines = httpx.post(
        drafting.url + "/v1/completions",
        json=REPEATS | {"stream": True, "stream_options": {"include_usage": True}},
        timeout=60,
    ).text.split("\n\n")
    last = json.loads(lines[-3].removeprefix("data: "))
    assert details(last)[0] == kept


def test_one_request_can_do_without(drafting: Any) -> None:
    for switch, most in ((False, 0), ({"tokens": 0}, 0), ({"tokens": 1}, 1), (True, 63), (None, 63), ({}, 63)):
        before = counted(drafting)
        kept, lost = details(post(drafting, speculation=switch, **REPEATS))
        looks = counted(drafting)['llmkit_speculation_drafts_total{drafter="ngram"}']
        looks -= before['llmkit_speculation_drafts_total{drafter="ngram"}']
        assert kept + lost <= most * looks, switch
        assert (kept > 0) == (most > 0), switch
    wrong = {"maybe": "speculation: is not an object", "tokens": "speculation.tokens: 64 is not from 0 to 63"}
    for switch, why in (("maybe", wrong["maybe"]), ({"tokens": 64}, wrong["tokens"]), ({"n": 1}, "speculation.n: unk")):
        said = httpx.post(drafting.url + "/v1/completions", json=REPEATS | {"speculation": switch})
        assert said.status_code == 400 and said.json()["error"]["message"].startswith(why)


def test_an_answer_that_was_foretold_takes_fewer_steps(server: Any, drafting: Any) -> None:
    drawn = {"temperature": 0.9, "seed": 3, "logit_bias": {str(id): 100 for id in range(40, 60)}}  # single letters
    plain = chat(server, **drawn)
    text = plain["choices"][0]["message"]["content"]
    alone = details(chat(drafting, **drawn))[0]
    for content in (text, [{"type": "text", "text": text[:20]}, {"type": "text", "text": text[20:]}]):
        said = chat(drafting, **drawn, prediction={"type": "content", "content": content})
        assert said["choices"] == plain["choices"]
        assert details(said)[0] > alone + 4
    off = chat(server, **drawn, prediction={"type": "content", "content": text})
    assert details(off) == (0, 0) and off["choices"] == plain["choices"]
    wrong = chat(drafting, **drawn, prediction={"content": "the lazy dog " * 9})
    assert wrong["choices"] == plain["choices"]


def test_a_prediction_that_is_none_is_refused(drafting: Any) -> None:
    cases = {
        "prediction: is not an object": "text",
        "prediction.type: 'other' is none of content": {"type": "other", "content": "a"},
        "prediction.content: is missing": {"type": "content"},
        "prediction.content: is neither a text nor a list of parts": {"type": "content", "content": 3},
        "prediction.content: has": {"type": "content", "content": "hello world " * 2000},
        "prediction.words: unknown field": {"type": "content", "content": "a", "words": 3},
    }
    for why, prediction in cases.items():
        body = {"messages": [{"role": "user", "content": "a"}], "prediction": prediction}
        said = httpx.post(drafting.url + "/v1/chat/completions", json=body)
        assert said.status_code == 400 and said.json()["error"]["message"].startswith(why), said.text


def test_metrics_count_drafts_by_place_and_by_category(drafting: Any) -> None:
    before = counted(drafting)
    for name in ("copy", "copy", "other work", "third", "x" * 65, "a\nb", "\x7f", ""):
        post(drafting, metadata={"category": name, "else": "1"}, **REPEATS)
    post(drafting, "/v1/responses", input="a", metadata={"category": "copy"}, max_output_tokens=2)
    after = counted(drafting)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    named = {"copy": 3, "other work": 1, "other": 4, "none": 1}
    for name, count in named.items():
        assert more(f'llmkit_category_requests_total{{category="{name}"}}') == count, name
    assert len(re.findall(r"llmkit_category_requests_total\{", "\n".join(after))) == 4
    of = '{category="other work"}'
    made, kept = (
        more(f"llmkit_category_completion_tokens_total{of}"),
        more(f"llmkit_category_accepted_tokens_total{of}"),
    )
    assert made == 24 == kept + more(f"llmkit_category_steps_total{of}") and kept > 4
    assert more(f"llmkit_category_drafted_tokens_total{of}") >= kept and more(f"llmkit_category_seconds_total{of}") > 0

    def engine(name: str) -> float:
        return more(f'llmkit_speculation_{name}_total{{drafter="ngram"}}')

    places = [more(name) for name in after if "accepted_tokens_per_pos" in name]
    assert sum(places) == engine("accepted_tokens") > 0 and places == sorted(places, reverse=True)
    assert engine("drafts") >= places[0] and engine("drafted_tokens") >= sum(places)
    assert engine("drafting_seconds") > 0 and engine("verifying_seconds") > 0
    assert engine("drafting_seconds") + engine("verifying_seconds") <= more("llmkit_engine_seconds_total")


def test_the_client_that_measures_sees_them_by_category(drafting: Any, tmp_path: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"category": "copy", "turns": ["hello"]}) + "\n" + json.dumps(REPEATS) + "\n")
    load, rows = Load(4, concurrency=2), from_file(path, "tiny", 24, True)
    got = summary(load, asyncio.run(drive(load, repeated(rows), Endpoint(drafting.url).send)), {})
    (own,) = got["categories"].values()
    assert own["done"] == 2 and own["completion_tokens"] == 48 and own["drafts"]["tokens_a_step"] > 1.2
    assert got["drafts"]["accepted"] > own["drafts"]["accepted"] > 4 and got["drafts"]["acceptance"] <= 1


def test_responses_tell_of_drafts_too(drafting: Any) -> None:
    body = {"input": "hello world hello world", "temperature": 0, "max_output_tokens": 24}
    usage = post(drafting, "/v1/responses", **body)["usage"]
    told = usage["output_tokens_details"]
    assert 0 < told["accepted_prediction_tokens"] < usage["output_tokens"]
    assert told["rejected_prediction_tokens"] >= 0


def test_a_server_without_drafts_tells_of_none(server: Any) -> None:
    assert not [name for name in counted(server) if name.startswith("llmkit_speculation")]


def test_categories_are_bounded() -> None:
    some = Categories(2)
    assert [some.of(name) for name in ("a", "none", "b", "c", "a", "other")] == [
        "a",
        "none",
        "b",
        "other",
        "a",
        "other",
    ]
    assert Categories(0).of("a") == "other"


def test_what_is_foretold_reaches_the_engine() -> None:
    request = Request("a", (1, 2), prediction=(3, 4))
    assert request_in(json.loads(json.dumps(request_out(request)))).prediction == (3, 4)
    assert "prediction" not in request_out(Request("a", (1, 2)))


def test_a_drafter_that_failed_is_told_of_once_and_counted(
    drafting: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = 'llmkit_speculation_failed_drafters_total{drafter="ngram"}'
    assert counted(drafting)[name] == 0
    remote, why = Remote({}), "ngram: MemoryError (ngram.py:9): "
    monkeypatch.setattr(logging.getLogger("llmkit.serve"), "propagate", True)
    with caplog.at_level(logging.ERROR, "llmkit.serve"):
        for fallen in ((), (why,), (why,)):
            remote._take({"stats": {"fallen": fallen}})
    assert [vars(record)["why"] for record in caplog.records] == [why]
    monkeypatch.setitem(drafting.service.engine.stats, "fallen", (why,))
    assert counted(drafting)[name] == 1


@pytest.mark.parametrize("said", [3, "copy", ["copy"], {"category": 3}, {"else": {}}])
def test_metadata_that_is_no_object_of_texts_is_refused(said: Any) -> None:
    with pytest.raises(Refusal, match="metadata: is not an object of texts"):
        category(Fields({"metadata": said}))
