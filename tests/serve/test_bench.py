"""A load's arithmetic on a clock of its own: every time below is scripted, and none of them passes."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import selectors
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from scipy import stats
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmkit.cli.bench_page import lines, page_of
from llmkit.cli.main import _guarded
from llmkit.core.errors import DataError, RecipeError, ResourceError
from llmkit.serve.bench.aim import aimed
from llmkit.serve.bench.drive import Driven, drive
from llmkit.serve.bench.http import Endpoint, Failed
from llmkit.serve.bench.load import Asked, Load, Made, from_file
from llmkit.serve.bench.shot import Send
from llmkit.serve.bench.summary import bounds, summary
from tests.serve.scripted import running

T = TypeVar("T")
Events = AsyncGenerator[dict[str, Any], None]


class Jump(selectors.DefaultSelector):
    """Waits for nothing: the time goes on at once to when the next thing is due."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        found = super().select(0)
        if not found and timeout:
            self.now += timeout
        return found


class Virtual(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.jump = Jump()
        super().__init__(self.jump)

    def time(self) -> float:
        return self.jump.now


def run(work: Callable[[Virtual], Coroutine[Any, Any, T]]) -> T:
    loop = Virtual()
    try:
        return loop.run_until_complete(work(loop))
    finally:
        loop.close()


def text(said: str) -> dict[str, Any]:
    return {"choices": [{"text": said, "finish_reason": None}]}


def end(prompt: int, made: int) -> list[dict[str, Any]]:
    return [
        {"choices": [{"text": "", "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": made}},
    ]


def scripted(first: float, gap: float, tokens: int) -> Send:
    """A server of endless capacity that takes the same times for each."""

    async def send(asked: Asked) -> Events:
        await asyncio.sleep(first)
        yield text("a")
        for _ in range(tokens - 1):
            await asyncio.sleep(gap)
            yield text("b")
        for event in end(10, tokens):
            yield event

    return send


def asked() -> Iterator[Asked]:
    return Made("m", 8, 4).asked()


def test_arrivals_are_a_poisson_process_that_its_seed_repeats() -> None:
    load = Load(5000, rate=4.0, seed=3)
    times = load.arrivals()
    gaps = np.diff([0.0, *times])
    assert stats.kstest(gaps, "expon", args=(0, 0.25)).pvalue > 0.01
    counts = np.histogram(times, bins=np.arange(0.0, times[-1], 1.0))[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.15)
    assert times == Load(5000, rate=4.0, seed=3).arrivals() != Load(5000, rate=4.0, seed=4).arrivals()
    assert Load(3).arrivals() == [0.0, 0.0, 0.0]


def test_an_open_load_waits_for_no_answer_and_its_figures_are_those_of_the_script() -> None:
    load = Load(40, warmup=10, rate=5.0, seed=1)
    driven = run(lambda loop: drive(load, asked(), scripted(2.0, 0.1, 5)))
    arrivals = load.arrivals()
    assert [shot.began for shot in driven.shots] == pytest.approx(arrivals)
    assert max(shot.delay for shot in driven.shots) == pytest.approx(0.0, abs=1e-9)
    got = summary(load, driven, {"ttft": 2.5, "itl": 0.05})
    for name, value in (("ttft", 2.0), ("itl", 0.1), ("itl_mean", 0.1), ("e2e", 2.4)):
        assert got[name]["p50"] == pytest.approx(value) == got[name]["max"]
    assert got["itl"]["n"] == 40 * 4
    window = arrivals[-1] + 2.4 - arrivals[10]
    assert got["window"] == pytest.approx(window)
    assert got["per_second"]["completion_tokens"] == pytest.approx(200 / window)
    assert got["per_second"]["tokens"] == pytest.approx(600 / window)
    assert got["goodput"]["requests"] == 0 and summary(load, driven, {"itl": 0.11})["goodput"]["share"] == 1.0
    assert got["requests"] == {"warmup": 10, "measured": 40, "done": 40, "refused_429": 0, "failed": 0}
    assert not got["client"]["late"] and got["client"]["delay"]["max"] == pytest.approx(0.0, abs=1e-9)


def test_a_closed_load_asks_as_soon_as_another_has_ended() -> None:
    load = Load(12, concurrency=3)
    driven = run(lambda loop: drive(load, asked(), scripted(1.0, 0.5, 3)))
    assert [shot.began for shot in driven.shots] == pytest.approx([2.0 * (at // 3) for at in range(12)])
    got = summary(load, driven, {})
    assert got["window"] == pytest.approx(8.0) and got["per_second"]["requests"] == pytest.approx(1.5)
    assert got["client"]["delay"] is None and got["goodput"] is None


def test_percentiles_lie_between_neighbours_and_goodput_counts_who_kept_all_bounds() -> None:
    load = Load(101, rate=math.inf)
    numbers = iter(range(101))

    async def send(asked: Asked) -> Events:
        at = next(numbers)
        await asyncio.sleep(0.01 * at)
        yield text("a")
        await asyncio.sleep(0.3 if at % 2 else 0.1)
        yield text("b")
        for event in end(3, 2):
            yield event

    driven = run(lambda loop: drive(load, asked(), send))
    got = summary(load, driven, {"ttft": 0.495, "itl": 0.2})
    assert [got["ttft"][name] for name in ("p50", "p90", "p95", "p99", "max")] == pytest.approx(
        [0.50, 0.90, 0.95, 0.99, 1.00]
    )
    assert got["ttft"]["mean"] == pytest.approx(0.5) and got["itl"]["p50"] == pytest.approx(0.1)
    assert got["goodput"]["requests"] == 25  # even numbers up to 49
    assert got["goodput"]["share"] == pytest.approx(25 / 101)


def test_several_tokens_in_a_piece_are_counted_as_the_server_counts() -> None:
    async def send(asked: Asked) -> Events:
        await asyncio.sleep(1.0)
        yield {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
        yield {"choices": [{"delta": {"reasoning_content": "ab"}, "finish_reason": None}]}
        await asyncio.sleep(0.9)
        yield {"choices": [{"delta": {"content": "cd"}, "finish_reason": "stop"}]}
        yield {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 4}}

    load = Load(1, concurrency=1)
    got = summary(load, run(lambda loop: drive(load, asked(), send)), {})
    assert got["tokens"] == {"prompt": 1, "completion": 4, "counted_by": "server"}
    assert got["itl"]["max"] == pytest.approx(0.9) and got["itl_mean"]["max"] == pytest.approx(0.3)


FAULTS: dict[str, Any] = {
    "429: busy": Failed(429, "busy"),
    "503: gone": Failed(503, "gone"),
    "ConnectionResetError: ": ConnectionResetError(),
    "OSError: [Errno 24] Too many open files": OSError(errno.EMFILE, "Too many open files"),
    "no end after 5 s": None,
    "the answer has no end": [text("a")],
    "the answer is empty": [*end(1, 0)],
}


def test_what_fails_is_counted_by_its_cause_and_is_in_no_time() -> None:
    left = iter([*FAULTS.values(), None])

    async def send(asked: Asked) -> Events:
        fault = next(left)
        yield text("a") if not isinstance(fault, list) else fault[0]
        if isinstance(fault, Exception):
            raise fault
        if fault is None:
            await asyncio.sleep(100.0)
        for event in (fault or [])[1:]:
            yield event

    load = Load(len(FAULTS), rate=2.0, timeout=5.0)
    driven = run(lambda loop: drive(load, asked(), send))
    got = summary(load, driven, {"ttft": 9.0})
    assert set(got["errors"]) == set(FAULTS)
    assert got["requests"]["refused_429"] == 1 and got["requests"]["failed"] == len(FAULTS) - 1
    assert got["ttft"] is None and got["goodput"]["share"] == 0.0
    assert got["client"]["short"] == 1


def test_a_late_client_is_told() -> None:
    load = Load(20, rate=10.0, seed=2)

    def late(loop: Virtual) -> Coroutine[Any, Any, Driven]:
        inner = scripted(0.5, 0.1, 2)

        async def send(asked: Asked) -> Events:
            loop.jump.now += 0.3  # the client's own work
            async for event in inner(asked):
                yield event

        return drive(load, asked(), send)

    got = summary(load, run(late), {})
    assert got["client"]["late"] and got["client"]["delay"]["max"] > 1.0 and got["client"]["lag"]["max"] > 0.25


def test_prompts_are_as_long_as_the_server_counts_and_share_what_they_are_to() -> None:
    async def send(asked: Asked) -> Events:
        yield text("a")
        for event in end(2 * len(asked.body["prompt"].split()), 1):
            yield event

    made = run(lambda loop: aimed(Made("m", 1, 9), 100, 40, send, 1.0))
    stream = made.asked()
    prompts = [next(stream).body["prompt"].split() for _ in range(3)]
    assert [len(words) for words in prompts] == [50] * 3
    assert prompts[0][:20] == prompts[1][:20] and len({tuple(words[20:]) for words in prompts}) == 3
    assert next(stream).body["max_tokens"] == 9 and next(stream).body["ignore_eos"] is True

    async def refuses(asked: Asked) -> Events:
        raise Failed(401, "no key")
        yield {}

    with pytest.raises(ResourceError, match="401: no key"):
        run(lambda loop: aimed(Made("m", 1, 9), 100, 0, refuses, 1.0))


def test_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 3}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    one, two = from_file(path, "m", 7, exact=False)
    assert (one.path, one.body["max_tokens"], two.path) == ("/completions", 3, "/chat/completions")
    assert "ignore_eos" not in one.body and two.body["stream_options"] == {"include_usage": True}
    for wrong in ("[]", "{", '{"prompt": 1}', '{"prompt": "a", "max_tokens": "x"}'):
        path.write_text(wrong)
        with pytest.raises(DataError, match=r"rows.jsonl:1: is no request"):
            from_file(path, "m", 7, exact=False)


def test_rows_have_categories_and_turns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question_id": 1, "category": "qa", "turns": ["a", "b"]}\n{"prompt": "c"}\n')
    one, two = from_file(path, "m", 7, exact=True)
    assert (one.category, two.category, one.path) == ("qa", "", "/chat/completions")
    assert one.body["messages"] == [{"role": "user", "content": "a"}]
    assert one.body["metadata"] == {"category": "qa"} and "metadata" not in two.body
    assert "metadata" not in from_file(path, "m", 7, exact=False)[0].body
    for wrong in ('{"turns": []}', '{"turns": [1]}', '{"turns": "a"}', '{"prompt": "a", "category": 1}'):
        path.write_text(wrong)
        with pytest.raises(DataError, match="is no request; fix: write an object with prompt, messages or turns"):
            from_file(path, "m", 7, exact=False)


@pytest.mark.parametrize("concurrency", [0, 2])
def test_all_turns_are_asked_with_the_answers_in_between(concurrency: int, tmp_path: Path) -> None:
    path, bodies = tmp_path / "rows.jsonl", list[Any]()
    path.write_text('{"category": "qa", "turns": ["a", "b", "c"]}\n{"turns": ["fails", "never"]}\n')

    async def send(asked: Asked) -> Events:
        bodies.append(asked.body["messages"])
        said = asked.body["messages"][-1]["content"]
        if said == "fails":
            raise Failed(500, "no")
        yield text(said)
        yield text("!")
        for event in end(9, 2):
            yield event

    load = Load(2, concurrency=concurrency)
    driven = run(lambda loop: drive(load, iter(from_file(path, "m", 7, exact=True)), send))
    said = [[(one["role"][0], one["content"]) for one in body] for body in bodies if body[0]["content"] == "a"]
    last = [("u", "a"), ("a", "a!"), ("u", "b"), ("a", "b!"), ("u", "c")]
    assert said == [last[:1], last[:3], last] and len(bodies) == 4
    assert [(shot.number, shot.category, shot.good) for shot in driven.shots] == [(0, "qa", True)] * 3 + [
        (1, "", False)
    ]


def test_figures_of_a_category_are_those_of_its_requests() -> None:
    rows = [Asked("/completions", {}, name) for name in ("a", "b", "", "a")]
    usage = {"a": {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}, "b": {"reasoning_tokens": 0}}

    async def send(asked: Asked) -> Events:
        await asyncio.sleep(2.0 if asked.category == "a" else 1.0)
        yield text("x")
        *events, last = end(9, 5)
        last["usage"]["completion_tokens_details"] = usage.get(asked.category)
        for event in (*events, last):
            yield event

    load = Load(4, concurrency=1)
    got = summary(load, run(lambda loop: drive(load, iter(rows), send)), {})
    assert list(got["categories"]) == ["a", "b"]
    a, b = got["categories"].values()
    assert (a["requests"], a["done"], a["completion_tokens"], b["done"]) == (2, 2, 10, 1)
    told = {"drafted": 8, "accepted": 6, "acceptance": 0.75, "tokens_a_step": 2.5}
    assert a["drafts"] == told == got["drafts"] and b["drafts"] is None
    assert a["e2e"]["p50"] == pytest.approx(2.0) and b["ttft"]["p50"] == pytest.approx(1.0)
    shown = result_of(got)
    assert ["a", "2", "10", "8", "6", "2.50", "2.0000", "-", "2.0000"] in [line.split() for line in lines(shown)]
    assert "drafts: 6 of 8 were right (75.0%), 2.50 tokens a step" in lines(shown)
    assert "By category" in page_of(shown) and "<td>2.50" in page_of(shown)


def result_of(summary: dict[str, Any]) -> dict[str, Any]:
    return summary | {"url": "http://a", "model": "m", "load": {"warmup": 0}, "shots": []}


def test_bounds_are_read_or_refused() -> None:
    assert bounds("ttft:0.5,itl:0.1") == {"ttft": 0.5, "itl": 0.1} and bounds("") == {}
    for wrong in ("ttft", "ttft:x", "ttft:-1", "speed:1", "ttft:nan"):
        with pytest.raises(RecipeError, match="bounds nothing"):
            bounds(wrong)
    for wrong in ("ftp://a", "http://", "http://a:b", "://"):
        with pytest.raises(RecipeError, match="is no address"):
            Endpoint(wrong)


async def _completions(request: Request) -> Response:
    body = await request.json()
    if request.headers.get("authorization") != "Bearer sk-9":
        return JSONResponse({"error": {"message": "no key"}}, 401)
    many = body["max_tokens"]

    async def lines() -> AsyncGenerator[bytes, None]:
        for event in [text("x")] * many + end(len(body["prompt"].split()), many):
            yield b"data: " + json.dumps(event).encode() + b"\r\n\r\n"
        yield b": a remark\n\ndata: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


def test_the_verb_measures_a_server_and_leaves_a_page(tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    def call(url: str, *more: str) -> tuple[int, str, str]:
        words = ["--model", "<m>", "--requests", "12", "--warmup", "2", "--prompt-tokens", "20", "--output-tokens", "5"]
        code = _guarded(["bench", "serve", url, *words, *more], False)
        return code, *capfd.readouterr()

    with running(Starlette(routes=[Route("/v1/completions", _completions, methods=["POST"])])) as url:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-9")
        code, out, _ = call(url, "--rate", "400", "--slo", "ttft:60", "--out", str(tmp_path / "b"), "--json")
        got = json.loads(out.splitlines()[-1])
        assert code == 0
        assert got["requests"] == {"warmup": 2, "measured": 12, "done": 12, "refused_429": 0, "failed": 0}
        assert got["tokens"] == {"prompt": 240, "completion": 60, "counted_by": "server"}
        assert got["goodput"]["share"] == 1.0
        whole, page = (tmp_path / "b.json").read_text(), (tmp_path / "b.html").read_text()
        assert len(json.loads(whole)["shots"]) == 14 and "sk-9" not in whole
        assert page.count("<svg") == 5 and "<m>" not in page and "http" not in page.replace(url, "")
        code, out, _ = call(url, "--concurrency", "3")
        assert code == 0 and "12 of 12 answered" in out and "time to first token" in out
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        code, _, err = call(url, "--concurrency", "2")
        assert code == 5 and "401: no key" in err
    for more in ([], ["--rate", "1", "--concurrency", "1"], ["--rate", "1", "--shared-tokens", "21"]):
        assert call(url, *more)[0] == 2
    assert call(url, "--rate", "1")[0] == 5  # nobody is there any longer
