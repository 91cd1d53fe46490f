"""The same key, the same request: carried out once, told as often as it is asked for."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.serve.raw import connect, head

ASKED = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 1.0}


def ask(server, key, **more):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        return client.post("/v1/chat/completions", json=ASKED | more, headers={"idempotency-key": key})


def test_a_retry_gets_the_same_answer(server):
    begun = server.engine.stats["requests"]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda _: ask(server, "one").content, range(4)))
    later = ask(server, "one").content
    assert len({*at_once, later}) == 1
    assert ask(server, "two").content != later
    streamed = [ask(server, "three", stream=True).content for _ in range(2)]
    assert streamed[0] == streamed[1] and streamed[0].endswith(b"data: [DONE]\n\n")
    assert server.engine.stats["requests"] - begun == 3


def test_a_key_that_is_too_long_is_refused_and_not_passed_over(server):
    assert ask(server, "k" * 255).status_code == 200
    said = ask(server, "k" * 256)
    assert said.status_code == 400 and said.json()["error"]["param"] == "idempotency-key"


def test_a_key_is_of_one_request_and_what_was_refused_may_be_tried_again(server):
    assert ask(server, "four").status_code == 200
    assert ask(server, "four", max_tokens=9).status_code == 409
    assert ask(server, "five", max_tokens=-1).status_code == 400
    assert ask(server, "five").status_code == 200


def test_a_client_that_was_cut_off_finds_its_answer(server):
    import json

    data, begun = json.dumps(ASKED | {"max_tokens": 60, "ignore_eos": True}).encode(), server.engine.stats["requests"]
    with connect(server) as own:
        own.sendall(head(Content_Length=len(data), Idempotency_Key="six") + data)
        while server.engine.stats["requests"] == begun:
            pass
    with httpx.Client(base_url=server.url, timeout=30) as client:
        headers = {"idempotency-key": "six", "content-type": "application/json"}
        said = client.post("/v1/chat/completions", content=data, headers=headers)
    assert said.json()["usage"]["completion_tokens"] == 60 and server.engine.stats["requests"] == begun + 1


def test_an_answer_is_kept_in_one_part_and_told_in_it(server):
    first = ask(server, "seven", stream=True, max_tokens=30, ignore_eos=True).content
    kept = server.door.app.app.kept["", "seven"]
    while not kept.done:  # its client has all of it before that
        time.sleep(0.01)
    assert [message["type"] for message in kept.messages] == ["http.response.start", "http.response.body"]
    assert (
        kept.messages[1]["body"] == first == ask(server, "seven", stream=True, max_tokens=30, ignore_eos=True).content
    )
