"""The other routes: tokens, responses, metrics, the record, the log."""

import json
import logging

import httpx
import pytest

from llmkit.core.records import RequestLog, read
from llmkit.serve import logs
from tests.serve.conftest import Running


def post(server, path, **fields):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        return client.post(path, json=fields)


def test_tokens_and_text_are_each_other_s_inverse(server, llm):
    said = post(server, "/tokenize", content="hello world").json()
    assert said["tokens"] == llm.tokenizer.encode("hello world") and said["count"] == len(said["tokens"])
    assert post(server, "/detokenize", tokens=said["tokens"]).json()["content"] == "hello world"
    chat = post(server, "/tokenize", messages=[{"role": "user", "content": "hi"}], return_token_strs=True).json()
    assert "".join(chat["token_strs"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert post(server, "/detokenize", tokens=[-1]).json()["error"]["param"] == "tokens"
    assert post(server, "/tokenize").status_code == 400


@pytest.fixture(scope="module")
def responses(client):
    return client.responses


def test_a_response_whole_and_in_events(responses):
    asked = {"model": "tiny", "input": "hello world", "temperature": 0, "max_output_tokens": 12}
    whole = responses.create(**asked)
    events = list(responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete")
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == whole.output_text == events[-1].response.output_text and said
    assert whole.usage.total_tokens == events[-1].response.usage.total_tokens > 12
    again = [{"role": "user", "content": "hello"}, *(item.model_dump() for item in whole.output)]
    assert responses.create(**asked | {"input": [*again, {"role": "user", "content": "go on"}]}).id != whole.id


def test_fields_of_a_response_are_named_as_its_client_named_them(server):
    bad = {
        "input": {"input": 3},
        "input.0.role": {"input": [{"role": "wizard", "content": "a"}]},
        "input.0.type": {"input": [{"type": "computer_call"}]},
        "max_output_tokens": {"input": "a", "max_output_tokens": 10**6},
        "tools.0.type": {"input": "a", "tools": [{"type": "web_search"}]},
        "background": {"input": "a", "background": True},
        "inptu": {"inptu": "a", "input": "a"},
    }
    for key, fields in bad.items():
        said = post(server, "/v1/responses", **fields)
        assert (said.status_code, said.json()["error"]["param"]) == (400, key), said.text


def test_metrics_count_what_passed(server, client):
    def numbers():
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    before = numbers()
    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=5)
    post(server, "/v1/chat/completions", messages=[], model="tiny")
    after = numbers()
    grown = {key: after[key] - before.get(key, 0.0) for key in after if after[key] != before.get(key, 0.0)}
    assert grown['llmkit_first_token_seconds_count{model="tiny"}'] == 1
    assert 1 <= grown['llmkit_completion_tokens_total{model="tiny"}'] <= 5
    assert grown['llmkit_http_requests_total{route="/v1/chat/completions",status="200"}'] == 1
    assert grown['llmkit_http_requests_total{route="/v1/chat/completions",status="400"}'] == 1
    assert grown['llmkit_rejected_total{code="invalid_value"}'] == 1
    assert grown["llmkit_engine_made_total"] >= 1 and after["llmkit_engine_up"] == 1


SECRET = "canary-4711"


def test_the_record_holds_each_request_and_none_of_its_words(llm, tmp_path):
    server = Running(llm, journal=tmp_path / "log" / "requests.jsonl")
    try:
        messages = [{"role": "user", "content": SECRET}]
        for more in ({}, {"user": "unit-7"}, {"n": 2, "stream": True}, {"temperature": 9}):
            post(server, "/v1/chat/completions", messages=messages, max_tokens=3, ignore_eos=True, **more)
    finally:
        server.stop()
    path = tmp_path / "log" / "requests.jsonl"
    rows = list(read(path, RequestLog))
    assert [row.completion_tokens for row in rows] == [3, 3, 6] and {row.assignment_probability for row in rows} == {
        1.0
    }
    assert rows[1].unit_id == "unit-7" and {row.finish_reason for row in rows} == {"length"}
    assert all(0 < row.seconds_to_first_token <= row.seconds and row.model_version for row in rows)
    assert SECRET not in path.read_text()


def test_records_turn_over_when_a_file_is_full(tmp_path):
    from llmkit.serve.journal import Journal

    row = RequestLog("r", "u", "base", 1.0, "single", "w", "", {}, 1, 1, 0.0, 0.1, 0.2, "stop")
    journal = Journal(tmp_path / "requests.jsonl", most=1000, keep=3)
    for _ in range(40):
        journal.write(row)
    journal.close()
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["requests.jsonl", "requests.jsonl.1", "requests.jsonl.2"]
    assert all(path.stat().st_size <= 1400 for path in files) and len(list(read(files[1], RequestLog))) > 1


EVIL = 'a"}\r\n{"level": "info", "event": "forged"}\x1b[2J\u2028\x00\ud800'


def test_a_log_line_is_one_json_object_whatever_is_in_it(server, tmp_path):
    path = tmp_path / "log"
    with path.open("w") as stream:
        handler = logs.begin(stream)
        try:
            logging.getLogger("llmkit.serve").info("%s", EVIL, extra={"model": EVIL, "url": "http://me:secret@x"})
            with httpx.Client(base_url=server.url) as client:
                client.get("/v1/models/%0d%0a%22%7d", headers={"x-request-id": 'x"}'})
                client.get("/v1/models", headers={"x-request-id": "mine-1"})
        finally:
            for name in ("llmkit.serve", "uvicorn", "asyncio"):
                logging.getLogger(name).removeHandler(handler)
    lines = path.read_bytes().splitlines()
    said = [json.loads(line) for line in lines]
    assert len(said) == 3 and said[0]["event"].startswith('a"}') and "forged" in said[0]["event"]
    assert "secret" not in path.read_text() and b"\x1b" not in path.read_bytes()
    assert said[2]["request_id"] == "mine-1" and said[1]["request_id"].startswith("req_")
    assert said[2]["status"] == 200
