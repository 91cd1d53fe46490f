"""The `vllm` member of the `generator` union against a small server and a small engine that say what vLLM says."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from llmkit.build.held import Here
from llmkit.core.errors import ModelError, RecipeError, ResourceError
from llmkit.inference.grammar import Choice, JsonObject, JsonSchema, Lark, Regex
from llmkit.inference.node import Vllm
from llmkit.inference.request import Ask, Completion, Prompt, RequestError
from llmkit.inference.sampling import Sampling
from llmkit.inference.vllm_served import body
from llmkit.inference.vllm_start import command, settings
from llmkit.inference.vllm_words import NAMES, said
from llmkit.inference.writer import Files
from llmkit.models.load import Loaded
from llmkit.models.node import ModelRef
from llmkit.models.probe import Support
from llmkit.models.resolve import resolve
from tests.conftest import make_tokenizer
from tests.inference.test_generators import Endpoint, endpoint

_ = endpoint  # a fixture

FILES = Files(Path("/models/tiny"), "fp32")
TOKENIZER = make_tokenizer()
HELD: Any = SimpleNamespace(files=lambda: FILES, tokenizer=TOKENIZER)
EVERY = {
    **{"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "max_tokens": 9, "min_tokens": 2, "seed": 3, "n": 2},
    **{"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.25, "ignore_eos": True},
    **{"stop": ("x",), "stop_ids": (4,), "allowed_ids": (4, 5), "bad_words": ("no",), "logit_bias": {5: -1.5}},
    **{"logprobs": 1, "prompt_logprobs": 0},
}


def test_every_field_has_its_word_and_the_rest_is_refused_by_name() -> None:
    assert set(EVERY) == set(NAMES)
    told = said(Sampling(**EVERY))
    lists = {"stop": ["x"], "stop_token_ids": [4], "allowed_token_ids": [4, 5], "bad_words": ["no"]}
    same = {name: value for name, value in EVERY.items() if name in told and name not in lists}
    assert told == same | lists and len(told) == len(EVERY)
    assert "logprobs" not in said(Sampling()) and said(Sampling())["temperature"] == 0.0
    Vllm().refuse(Sampling(**EVERY))
    wrong = {"beams": 2, "length_penalty": 0.5, "early_stopping": True, "n": 2, "logit_bias": {1: 200.0}}
    for key, value in wrong.items():
        with pytest.raises(RequestError, match=rf"^{key}: generator vllm .*; fix"):
            Vllm().refuse(Sampling(**{key: value}))
    for warm in (0.001, 3.0):
        with pytest.raises(RequestError, match=r"temperature: generator vllm draws at 0.01 to 2.0, not at"):
            Vllm().refuse(Sampling(temperature=warm))
    with pytest.raises(RequestError, match=r"grammar.schema.*uniqueItems"):
        Vllm().refuse(Sampling(grammar=JsonSchema.of({"type": "array", "uniqueItems": True})))


def test_a_grammar_is_named_as_vllm_names_it() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    kinds = {
        "json": (JsonSchema.of(schema), json.dumps(schema)),
        "json_object": (JsonObject(), True),
        "regex": (Regex(pattern="a+"), "a+"),
        "choice": (Choice(choices=("a", "b", "a")), ["a", "b"]),
    }
    for name, (grammar, value) in kinds.items():
        sent = body("m", Ask(Prompt((1,)), Sampling(grammar=grammar)))
        assert sent["structured_outputs"] == {name: value}
    assert Lark(grammar='start: "a"').named() == {"grammar": 'start: "a"'}


def test_what_contradicts_in_the_node_is_named() -> None:
    for wrong, key in (
        ({"url": "http://x/v1"}, "model"),
        ({"url": "http://x/v1", "model": "m", "python": "p"}, "python"),
        ({"model": "m"}, "model"),
        ({"key": "k"}, "key"),
    ):
        with pytest.raises(RecipeError, match=key):
            Vllm(**wrong)


def test_vllm_is_told_where_the_model_is_and_what_it_may_take(tmp_path: Path) -> None:
    plain = settings(Vllm(), FILES, cpu=True)
    assert plain["kv_cache_memory_bytes"] == 2 << 30 and plain["dtype"] == "float32"
    assert "kv_cache_memory_bytes" not in settings(Vllm(), FILES, cpu=False)
    more = settings(Vllm(size=1 << 20, length=64, precision="bf16", tensor=2, memory=0.5), FILES, cpu=False)
    assert (more["kv_cache_memory_bytes"], more["max_model_len"], more["dtype"]) == (1 << 20, 64, "bfloat16")
    assert (more["tensor_parallel_size"], more["gpu_memory_utilization"]) == (2, 0.5)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho cpu\n")
    python.chmod(0o755)
    line = command(Vllm(python=str(python), length=64), FILES, 81)
    assert line[:2] == [str(python), "-c"] and "vllm.entrypoints.openai.api_server" in line[2]
    pairs = dict(zip(line[3::2], line[4::2], strict=True))
    assert (pairs["--host"], pairs["--port"], pairs["--model"]) == ("127.0.0.1", "81", "/models/tiny")
    assert (pairs["--max-model-len"], pairs["--kv-cache-memory-bytes"]) == ("64", str(2 << 30))
    assert json.loads(pairs["--structured-outputs-config"]) == {"backend": "guidance"}


def test_a_server_that_does_not_start_is_named_with_what_it_said(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nif [ $# = 2 ]; then echo cpu; exit; fi\necho ValueError: no room\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(ResourceError, match=r"generator: vLLM's server ended with 3: ValueError: no room; fix"):
        Vllm(python=str(python)).open(HELD)
    python.write_text("#!/bin/sh\necho No module named vllm >&2; exit 1\n")
    with pytest.raises(ResourceError, match=r"generator.python: .* has no vLLM .*No module named vllm"):
        Vllm(python=str(python)).open(HELD)


SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.tell(b"")

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        known = self.headers["authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        self.tell(open(os.environ["ANSWER"], "rb").read() if known else b"{}")

    def tell(self, text):
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_a_server_is_started_asked_with_its_key_and_ends_with_us(tmp_path: Path, monkeypatch: Any) -> None:
    place = tmp_path / "vllm" / "entrypoints" / "openai"
    place.mkdir(parents=True)
    (tmp_path / "vllm" / "platforms.py").write_text("class current_platform:\n    is_cpu = lambda: True\n")
    (place / "api_server.py").write_text(SERVER)
    (tmp_path / "answer").write_text(json.dumps(ANSWER))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ANSWER", str(tmp_path / "answer"))
    writers: list[Any] = [Vllm(python=sys.executable).open(HELD) for _ in range(2)]
    for writer in writers:
        (made,) = writer.each([Ask(Prompt((5, 6)), Sampling(logprobs=1, prompt_logprobs=1))])
        checked(made, 0.0)
    closed, left = (writer.end.args[0] for writer in writers)
    assert closed.poll() is None and left.poll() is None
    writers[0].close()
    assert closed.poll() is not None
    left.stdin.close()  # what happens when this process is killed
    assert left.wait(60) is not None
    writers[1].close()


LOGPROBS = {
    "tokens": ["token_id:7", "token_id:8", "token_id:2"],
    "token_logprobs": [-0.5, -2.0, -0.1],
    "top_logprobs": [
        {"token_id:7": -0.5, "token_id:9": -1.5},
        {"token_id:8": -2.0, "token_id:9": -0.25},
        {"token_id:2": -0.1, "token_id:3": -3.0},
    ],
}
CHOICE = {
    **{"index": 0, "text": "ab", "token_ids": [7, 8, 2], "finish_reason": "stop", "stop_reason": None},
    **{"logprobs": LOGPROBS, "prompt_logprobs": [None, {"6": {"logprob": -1.0}, "4": {"logprob": -0.5}}]},
}
ANSWER = {"choices": [CHOICE], "usage": {"prompt_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}}


def served(to: Endpoint) -> Any:
    return Vllm(url=to.url, model="theirs", key="secret", tries=1).open(HELD)


def checked(made: Completion, law: float | None) -> None:
    """What both ways make of the same answer."""
    assert made.token_ids == (7, 8) and made.text == TOKENIZER.decode([7, 8]) and made.finish_reason == "stop"
    assert made.outputs[0].stop_reason is None and made.cached_tokens == 1 and made.prompt_tokens == 2
    assert [(one.logprob, one.sampling_logprob) for one in made.logprobs] == [(-0.5, law), (-2.0, law)]
    assert [one.top for one in made.logprobs] == [{7: -0.5}, {9: -0.25}]
    assert made.prompt_logprobs is not None and made.prompt_logprobs[0] is None
    second = made.prompt_logprobs[1]
    assert second is not None and (second.id, second.logprob, second.top) == (6, -1.0, {4: -0.5})


def test_by_url_tokens_go_there_and_come_back(endpoint: Any) -> None:
    to = endpoint((200, {}, ANSWER), (200, {}, ANSWER))
    ask = Ask(Prompt((5, 6), "said"), Sampling(logprobs=1, prompt_logprobs=1, logit_bias={3: 1.0}), adapter="lora")
    warm = Ask(Prompt((5, 6)), Sampling(logprobs=1, prompt_logprobs=1, temperature=1.0))
    writer = served(to)
    (greedy,) = writer.each([ask])
    (drawn,) = writer.each([warm])
    writer.close()
    checked(greedy, 0.0)
    checked(drawn, None)
    route, sent, key = to.asked[0]
    assert (route, key, sent["model"], sent["prompt"]) == ("/v1/completions", "Bearer secret", "lora", [5, 6])
    assert sent["logit_bias"] == {"3": 1.0} and sent["return_token_ids"] and sent["return_tokens_as_token_ids"]
    assert to.asked[1][1]["model"] == "theirs"


def test_by_url_ends_are_those_of_the_others(endpoint: Any) -> None:
    bare = CHOICE | {"logprobs": None, "prompt_logprobs": None}
    ends = [
        bare | {"stop_reason": "b"},  # a stop text: its tokens are part of the answer
        bare | {"stop_reason": 2},  # a token that the request named
        bare | {"stop_reason": 11},  # another end of the model's own
        bare | {"finish_reason": "length"},
    ]
    to = endpoint(*[(200, {}, {"choices": [one]}) for one in ends])
    sampling = Sampling(stop=("b",), stop_ids=(2,))
    made = [one.outputs[0] for one in served(to).each([Ask(Prompt((5, 6)), sampling)] * 2)]
    made += [one.outputs[0] for one in served(to).each([Ask(Prompt((5, 6)), sampling)])]
    made += [one.outputs[0] for one in served(to).each([Ask(Prompt((5, 6)), sampling)])]
    told = {one.stop_reason: one.token_ids for one in made if one.finish_reason == "stop"}
    assert told == {"b": (7, 8, 2), 2: (7, 8), None: (7, 8)}
    assert [one.token_ids for one in made if one.finish_reason == "length"] == [(7, 8, 2)]


def test_by_url_the_end_of_its_own_is_a_reason_where_it_was_named(endpoint: Any) -> None:
    own = CHOICE | {"logprobs": None, "prompt_logprobs": None}  # of which vLLM tells none
    to = endpoint(*[(200, {}, {"choices": [own]})] * 2)
    for sampling, reason in ((Sampling(stop_ids=(2, 4)), 2), (Sampling(stop_ids=(4,)), None)):
        (made,) = served(to).each([Ask(Prompt((5, 6)), sampling)])
        assert (made.outputs[0].stop_reason, made.token_ids) == (reason, (7, 8))


def test_by_url_what_it_cannot_do_is_refused_before_it_is_sent(endpoint: Any) -> None:
    to = endpoint((200, {}, {"choices": [CHOICE | {"token_ids": None}]}), (400, {}, {"error": {"message": "too long"}}))
    wrong = {
        "processors": Ask(Prompt((1,)), processors=(lambda *_: _[-1],)),
        "grammar": Ask(Prompt((1,)), Sampling(grammar=Lark(grammar='start: "a"'))),
        "beams": Ask(Prompt((1,)), Sampling(beams=2)),
        "prompt": Ask(Prompt(())),
    }
    for key, ask in wrong.items():
        with pytest.raises(RequestError, match=rf"^{key}: "):
            list(served(to).each([ask]))
    assert not to.asked
    with pytest.raises(ResourceError, match="something else than a completion"):
        list(served(to).each([Ask(Prompt((1,)))]))
    with pytest.raises(RequestError, match=r"refuses it \(400: too long\)"):
        list(served(to).each([Ask(Prompt((1,)))]))


def place(told: dict[int, float]) -> dict[int, Any]:
    """Log-probabilities as vLLM has them."""
    return {id: SimpleNamespace(logprob=value) for id, value in told.items()}


@dataclass
class Engine:
    """Ends what it was given, the last first."""

    added: list[tuple[str, Any, Any]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    dead: type[Exception] | None = None
    down: bool = False

    @property
    def engine_core(self) -> Engine:
        return self

    def shutdown(self) -> None:
        self.down = True

    def add_request(self, name: str, prompt: Any, how: Any) -> None:
        if len(prompt["prompt_token_ids"]) > 8:
            raise ValueError("the prompt is too long")
        self.added.append((name, prompt, how))
        self.waiting.append(name)

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names

    def step(self) -> list[Any]:
        if self.dead is not None:
            raise self.dead
        last = self.waiting.pop()
        name, prompt, how = next(one for one in self.added if one[0] == last)
        given = prompt["prompt_token_ids"]
        told = [place({7: -0.5, 9: -1.5}), place({8: -2.0, 9: -0.25}), place({2: -0.1, 3: -3.0})]
        one = SimpleNamespace(
            index=0, text="ab", token_ids=[7, 8, 2], finish_reason="stop", stop_reason=None, logprobs=told
        )
        if how.logprobs is None:
            one.logprobs = None
        prompt_told = None if how.prompt_logprobs is None else [None, place({6: -1.0, 4: -0.5})]
        made = SimpleNamespace(
            request_id=name, finished=True, outputs=[one], prompt_logprobs=prompt_told, num_cached_tokens=given[0] % 2
        )
        return [made]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package of that name, with what is read of it."""
    engine, started = Engine(), list[dict[str, Any]]()

    class Words(SimpleNamespace):
        def __init__(self, **more: Any) -> None:
            super().__init__(**({"logprobs": None, "prompt_logprobs": None} | more))

    class Dead(Exception):
        pass

    def start(**more: Any) -> Any:
        started.append(more)
        if more["gpu_memory_utilization"] == 1.0:
            raise RuntimeError("Engine core initialization failed")
        return SimpleNamespace(llm_engine=engine)

    def module(name: str, **more: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(more)
        monkeypatch.setitem(sys.modules, name, made)

    module("vllm", LLM=start, SamplingParams=Words)
    kinds = SimpleNamespace(FINAL_ONLY="final")
    module("vllm.sampling_params", RequestOutputKind=kinds, StructuredOutputsParams=Words)
    module("vllm.platforms", current_platform=SimpleNamespace(is_cpu=lambda: True))
    module("vllm.v1", **{})
    module("vllm.v1.engine", **{})
    module("vllm.v1.engine.exceptions", EngineDeadError=Dead)
    yield SimpleNamespace(engine=engine, started=started, dead=Dead)


def test_in_process_it_is_asked_the_same_and_answers_the_same(vllm: Any) -> None:
    writer = Vllm(sequences=2, length=32).open(HELD)
    assert vllm.started[0]["model"] == "/models/tiny" and vllm.started[0]["kv_cache_memory_bytes"] == 2 << 30
    sampling = Sampling(logprobs=1, prompt_logprobs=1, grammar=Choice(choices=("a", "b")), top_k=4)
    asks = [Ask(Prompt((i, 6)), sampling) for i in range(1, 40, 2)]
    made = list(writer.each(asks))
    for one in made:
        checked(one, 0.0)
    _, prompt, how = vllm.engine.added[3]
    assert prompt == {"prompt_token_ids": [7, 6]} and how.top_k == 4 and how.output_kind == "final"
    assert how.structured_outputs.choice == ["a", "b"] and not vllm.engine.aborted
    (drawn,) = writer.each([Ask(Prompt((1, 6)), Sampling(temperature=1.0, logprobs=1, prompt_logprobs=1))])
    checked(drawn, None)
    writer.close()
    assert vllm.engine.down


def test_in_process_completions_are_in_order_and_who_leaves_frees_the_rest(vllm: Any) -> None:
    writer = Vllm(sequences=2).open(HELD)
    taken = list[int]()

    def asks() -> Iterator[Ask]:
        for at in range(100):
            taken.append(at)
            yield Ask(Prompt((at,)))

    coming = writer.each(asks())
    assert [next(coming).cached_tokens for _ in range(5)] == [0, 1, 0, 1, 0]
    coming.close()
    assert len(taken) <= 8 + 5 and not writer.ended
    assert set(vllm.engine.aborted) == set(vllm.engine.waiting)


def test_in_process_faults_have_one_line(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Vllm().open(HELD)
    with pytest.raises(RequestError, match=r"generator: vLLM refuses it \(the prompt is too long\); fix"):
        list(writer.each([Ask(Prompt(tuple(range(9))))]))
    with pytest.raises(RequestError, match=r"^adapter: generator vllm in this process knows no adapters by name"):
        list(writer.each([Ask(Prompt((1,)), adapter="a")]))
    vllm.engine.dead = vllm.dead
    with pytest.raises(ResourceError, match=r"generator: vLLM's engine has ended"):
        list(writer.each([Ask(Prompt((1,)))]))
    with pytest.raises(ResourceError, match=r"vLLM does not start \(Engine core initialization failed\)"):
        Vllm(memory=1.0).open(HELD)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ResourceError, match=r"vLLM cannot be imported .*; fix: set generator.python .* generator.url"):
        Vllm().open(HELD)


def test_a_model_that_is_in_no_files_as_it_is_held_is_refused(tiny: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny)
    resolved = resolve(ModelRef(name=str(tiny)))
    here = Here(Loaded(model, TOKENIZER, "packed", Support(True, True, True), resolved))
    assert here.files() == Files(tiny, "fp32")
    for changed in (replace(here, trained=model), replace(here, loaded=replace(here.loaded, added=(3,)))):
        with pytest.raises(ModelError, match=r"generator: it has (an adapter|new tokens), .*merge or export"):
            Vllm().open(changed)
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ModelError, match=r"generator: it has its positions scaled"):
        here.files()
    model.config.quantization_config = {"bits": 4}
    with pytest.raises(ModelError, match=r"generator: it is quantised here"):
        here.files()
