"""The other routes: tokens, responses, metrics, the record, the log."""

import json
import logging

import httpx
import pytest

from llmkit.core.records import RequestLog, read
from llmkit.serve import logs
from tests.serve.conftest import Running
from tests.serve.test_serve_rows import until


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
        "tools": {"input": "a", "tools": [{"type": "function", "name": "walk"}]},
        "inptu": {"inptu": "a", "input": "a"},
    }
    for key, fields in bad.items():
        said = post(server, "/v1/responses", **fields)
        assert (said.status_code, said.json()["error"]["param"]) == (400, key), said.text


def test_another_method_is_told_which_are_answered(server):
    for path, method, allowed in (("/v1/chat/completions", "GET", "POST"), ("/v1/models", "POST", "GET, HEAD")):
        said = httpx.request(method, server.url + path)
        assert (said.status_code, said.headers["allow"]) == (405, allowed)
        error = said.json()["error"]
        assert error["code"] == "method_not_allowed" and error["message"].endswith(f"ask with {allowed}")


def test_a_field_of_others_is_not_taken_for_one_of_ours(server):
    asked = {"messages": [{"role": "user", "content": "a"}]}
    for more, hint in (({"reasoning_effort": "low"}, ""), ({"max_token": 3}, "; did you mean max_tokens?")):
        said = post(server, "/v1/chat/completions", **asked, **more).json()["error"]["message"]
        assert said == f"{next(iter(more))}: unknown field{hint}"
    assert post(server, "/v1/chat/completions").json()["error"]["message"] == "messages: is missing"
    assert post(server, "/v1/chat/completions", messages=[]).json()["error"]["message"] == "messages: is empty"


def test_tools_that_the_template_does_not_show_are_refused_in_words_for_a_client(server):
    asked = {"messages": [{"role": "user", "content": "a"}]}
    tools = [{"type": "function", "function": {"name": "walk"}}]
    said = post(server, "/v1/chat/completions", **asked, tools=tools).json()["error"]
    assert (said["param"], said["code"]) == ("tools", "unsupported_parameter")
    assert said["message"].endswith("shows no tools; ask without tools, or serve it with --template NAME")
    assert (
        post(server, "/v1/chat/completions", **asked, tools=tools, tool_choice="none", max_tokens=1).status_code == 200
    )


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


def test_files_that_cannot_turn_over_lose_records_and_fail_no_request(tmp_path):
    from llmkit.serve.journal import Journal

    row = RequestLog("r", "u", "base", 1.0, "single", "w", "", {}, 1, 1, 0.0, 0.1, 0.2, "stop")
    path = tmp_path / "requests.jsonl"
    journal = Journal(path, most=1000, keep=3)
    (tmp_path / "requests.jsonl.1" / "in the way").mkdir(parents=True)
    (tmp_path / "requests.jsonl.2").write_text("an older one")
    for _ in range(20):
        journal.write(row)
    full = path.stat().st_size
    assert journal.lost and 1000 <= full <= 1400  # what is full does not grow
    (tmp_path / "requests.jsonl.1" / "in the way").rmdir()
    (tmp_path / "requests.jsonl.1").rmdir()
    lost = journal.lost
    journal.write(row)
    journal.close()
    assert journal.lost == lost and len(list(read(path, RequestLog))) == 1
    assert (tmp_path / "requests.jsonl.1").stat().st_size == full


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
            until(lambda: b"mine-1" in path.read_bytes())  # the line of a request comes after its answer
        finally:
            for name in ("llmkit.serve", "uvicorn", "asyncio"):
                logging.getLogger(name).removeHandler(handler)
    lines = path.read_bytes().splitlines()
    said = [json.loads(line) for line in lines]
    assert len(said) == 3 and said[0]["event"].startswith('a"}') and "forged" in said[0]["event"]
    assert "secret" not in path.read_text() and b"\x1b" not in path.read_bytes()
    assert said[2]["request_id"] == "mine-1" and said[1]["request_id"].startswith("req_")
    assert said[2]["status"] == 200


def test_embeddings_are_the_mean_of_hidden_states_and_do_not_depend_on_their_neighbours(client, llm):
    import torch

    texts = ["hello world", "the quick brown fox jumps over the lazy dog", "a"]
    made = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    alone = client.embeddings.create(model="tiny", input=texts[1])  # the client asks for base64 by itself
    assert [one.index for one in made.data] == [0, 1, 2] and made.usage.prompt_tokens > 10
    for one, text in zip(made.data, texts, strict=True):
        ids = torch.tensor([llm.tokenizer.encode(text)])
        with torch.no_grad():
            hidden = llm.loaded.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        mean = hidden.mean(0)
        assert torch.allclose(torch.tensor(one.embedding), mean / mean.norm(), atol=1e-5)
    assert alone.data[0].embedding == pytest.approx(made.data[1].embedding, abs=1e-6)


def test_the_dashboard_shows_what_there_is(server):
    import re
    from pathlib import Path

    from llmkit.serve import metrics

    board = json.loads(Path(metrics.__file__).with_name("grafana.json").read_text())
    text = httpx.get(server.url + "/metrics").text
    names = {name for name in re.findall(r"llmkit_\w+", json.dumps(board)) if name != "llmkit_serve"}
    assert len(names) > 15
    for name in names:
        assert name in text or name.removesuffix("_bucket") in text, name


def test_a_deadline_that_passed_is_told_and_nothing_was_made(server):
    made = server.engine.stats["made"]
    said = post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "a"}], deadline=1e-9)
    assert (said.status_code, said.json()["error"]["code"]) == (408, "deadline_exceeded")
    assert said.headers["x-should-retry"] == "false" and server.engine.stats["made"] == made


def test_a_dependency_under_its_floor_is_refused_in_one_line():
    from llmkit.core.errors import RecipeError
    from llmkit.serve.floors import FLOORS, check_floors

    check_floors()
    with pytest.raises(RecipeError) as refused:
        check_floors(lambda name: "0.48.9" if name == "starlette" else FLOORS[name][0])
    assert str(refused.value) == (
        "starlette 0.48.9 is not safe before strangers (CVE-2025-62727); fix: pip install 'starlette>=0.49.1'"
    )


def test_another_address_than_loopback_asks_for_a_key():
    from llmkit.core.errors import RecipeError
    from llmkit.models.node import ModelRef
    from llmkit.serve.start import Settings, start
    from llmkit.stages.serve import Serve

    with pytest.raises(RecipeError, match="key"):
        start(Settings(ModelRef(name="tiny"), host="0.0.0.0"))
    with pytest.raises(RecipeError, match="key_file"):
        Serve(model=ModelRef(name="tiny"), host="0.0.0.0", out="x")


def test_one_tenant_leaves_room_for_others():
    from llmkit.serve.caller import Caller
    from llmkit.serve.gate import Gate
    from llmkit.serve.node import Bounds
    from llmkit.serve.refusal import Refusal

    gate = Gate(Bounds(requests=10, tokens=1000, share=0.5), tenants=lambda: 2)
    anna, ben = Caller("anna"), Caller("ben")
    with gate.place(anna, 5, 10):
        with pytest.raises(Refusal) as refused, gate.place(anna, 1, 1):
            pass
        assert refused.value.status == 429 and refused.value.wait
        with gate.place(ben, 5, 500), pytest.raises(Refusal), gate.place(Caller("carl"), 1, 1):
            pass
    assert not gate.answers and not gate.tokens and not gate.keys
    with pytest.raises(Refusal) as refused, gate.place(anna, 1, 501):
        pass
    assert refused.value.status == 400
