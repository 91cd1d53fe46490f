"""Rollouts from a server that speaks vLLM's routes: weights reach it version by version, and answers are the engine's.

The server is a stand-in: our engine over whatever was last loaded, behind the routes that vLLM documents.
"""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmkit import run
from llmkit.build.held import Here
from llmkit.build.opening import load
from llmkit.core.errors import ModelError, RecipeError
from llmkit.inference.node import OwnEngine
from llmkit.inference.request import Ask, Prompt, RequestError
from llmkit.inference.sampling import Sampling
from llmkit.models.load import How
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from tests.distributed import QUIET, lines, together
from tests.distributed.test_rollout_ranks import answers, maker, same

THEIRS = {"stop_token_ids": "stop_ids"}
EOS = 2
"""The tiny model's end."""
KNOWN = ("temperature", "max_tokens", "n", "seed", "stop", "stop_token_ids", "logprobs")


class Server:
    """A model under its name, and adapters under theirs."""

    def __init__(self, folder, refuse="", off=0.0):
        """`off`: what its log-probabilities are beside those of the model."""
        self.off = off
        self.folder, self.refuse, self.lock = folder, [refuse], threading.Lock()
        self.writers, self.loaded, self.said = {"base": opened(folder)}, [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    status, told = outer.answer(self.path, body)
                text = told.encode() if isinstance(told, str) else json.dumps(told).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, path, body):
        self.said.append(path)
        if path in self.refuse:
            return 404, {"error": {"message": "Not Found"}}
        if path == "/v1/load_lora_adapter":
            self.writers[body["lora_name"]] = opened(Path(body["lora_path"]))
            self.loaded.append(load_file(Path(body["lora_path"]) / "adapter_model.safetensors"))
            return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        if path == "/v1/unload_lora_adapter":
            del self.writers[body["lora_name"]]
            return 200, "Success"
        if path == "/collective_rpc":
            weights = Path(body["kwargs"]["weights_path"])
            held = next(weights.glob("*.safetensors"))
            assert body["method"] == "reload_weights"
            self.loaded.append(load_file(held))
            self.writers["base"] = opened(self.folder, held)
            return 200, {"results": [None]}
        if path in ("/pause?mode=wait", "/resume"):
            return 200, {"status": "done"}
        if path != "/v1/completions" or body["model"] not in self.writers:
            return 404, {"error": {"message": f"The model `{body.get('model')}` does not exist."}}
        return 200, completed(self.writers[body["model"]], body, self.off)


def opened(folder, weights=None):
    made = load(resolve(ModelRef(name=str(folder))), ModelRef(name=str(folder)), How("cpu", "fp32", False))
    if weights is not None:
        made.model.load_state_dict(load_file(weights), strict=False)
    return OwnEngine().open(Here(made, most=2048))


def completed(writer, body, off):
    own = {THEIRS.get(key, key): body[key] for key in KNOWN if key in body}
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    (made,) = writer.each([Ask(Prompt(tuple(body["prompt"])), Sampling(**own))])
    choices = []
    for index, one in enumerate(made.outputs):
        ids, logps = list(one.token_ids), [token.sampling_logprob + off for token in one.logprobs]
        if one.finish_reason == "stop" and isinstance(one.stop_reason, int):
            ids, logps = [*ids, one.stop_reason], [*logps, -1.0]
        told = {"tokens": [f"token_id:{id}" for id in ids], "token_logprobs": logps}
        why = None if one.stop_reason == EOS else one.stop_reason  # named or not, it tells none of the model's own end
        said = {"finish_reason": one.finish_reason, "stop_reason": why, "token_ids": ids}
        choices.append({"index": index, "text": one.text, "logprobs": told, **said})
    return {"model": body["model"], "choices": choices}


def served(server):
    return {"group": 4, "max_tokens": 5, "vllm": {"url": server.url, "model": "base", "sequences": 2}}


WAYS = [
    ("lora", 1, {}),
    pytest.param("none", 1, {}, marks=pytest.mark.slow),
    pytest.param("lora", 2, {"strategy": {"kind": "zero", "stage": 3}}, marks=pytest.mark.slow),
    pytest.param("lora", 2, {"tensor": 2}, marks=pytest.mark.slow),
    ("none", 2, {"strategy": "fsdp"}),
]


@pytest.mark.parametrize(("adapter", "world", "parallel"), WAYS)
def test_a_server_draws_what_the_engine_draws(adapter, world, parallel, tiny, tmp_path):
    server = Server(tiny)
    more = {"kind": "lora", "rank": 4} if adapter == "lora" else "none"
    make = maker(tiny, tmp_path, adapter=more, steps=2)
    one, several = tmp_path / "one", tmp_path / "several"
    run(make(one), console=QUIET)
    node = make(several, parallel=parallel, rollout=served(server))
    if world == 1:
        run(node, console=QUIET)
    else:
        together(world, lambda _: run(node, console=QUIET), tmp_path, 200.0)
    same(several, one)
    ours, theirs = (json.loads((path / "metrics.jsonl").read_text().splitlines()[0]) for path in (several, one))
    assert ours["engine_gap"] == pytest.approx(theirs["engine_gap"], abs=1e-5)
    assert len(server.loaded) == 2
    first, last = server.loaded[0], server.loaded[-1]
    assert first.keys() == last.keys()
    assert any(not first[name].equal(last[name]) for name in first)
    assert list(server.writers) == ["base"]
    assert not (several / "weights").exists()
    assert [line["version"] for line in answers(several)][:: 3 * 4] == [0, 1]


def test_a_server_that_takes_no_weights_is_named(tiny, tmp_path):
    server = Server(tiny, refuse="/v1/load_lora_adapter")
    with pytest.raises(ModelError, match=r"rollout.vllm: .*404: Not Found.*--enable-lora"):
        run(maker(tiny, tmp_path)(tmp_path / "run", rollout=served(server)), console=QUIET)
    server.refuse = ["/collective_rpc"]
    with pytest.raises(ModelError, match=r"rollout.vllm: .*404: Not Found.*VLLM_SERVER_DEV_MODE"):
        run(maker(tiny, tmp_path)(tmp_path / "run", adapter="none", rollout=served(server)), console=QUIET)
    assert server.said[-3:] == ["/pause?mode=wait", "/collective_rpc", "/resume"]


def test_what_a_server_draws_counts_by_its_own_law(tiny, tmp_path):
    how = {"rollout": {**served(Server(tiny, off=-0.1)), "reuse": 2}, "loss": {"kind": "dapo", "truncate": 1.1}}
    made = run(maker(tiny, tmp_path)(tmp_path / "run", **how, steps=2), console=QUIET)
    pairs = [pair for one in answers(made.folder) for pair in zip(one["old"], one["logps"], strict=True)]
    ratios = [1.0 if drawn is None else min(math.exp(old - drawn), 1.1) for old, drawn in pairs]
    for line in lines(made.folder):
        assert line["importance"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert lines(made.folder)[0]["engine_gap"] == pytest.approx(0.1, abs=1e-4)
    server = Server(tiny, off=-1.0)
    with pytest.raises(ModelError, match=r"^rollout.vllm: the server's log-probabilities are off by 1 in the mean"):
        run(maker(tiny, tmp_path)(tmp_path / "other", rollout=served(server)), console=QUIET)


def test_what_fails_first_is_told_and_nothing_is_left(tiny, tmp_path):
    server = Server(tiny)
    server.refuse = ["/v1/completions", "/v1/unload_lora_adapter"]
    with pytest.raises(RequestError, match=r"^rollout.vllm: .*/v1/completions refuses it"):
        run(maker(tiny, tmp_path)(tmp_path / "run", rollout=served(server)), console=QUIET)
    assert server.said[-1] == "/v1/unload_lora_adapter"
    assert not (tmp_path / "run" / "weights").exists()


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"rollout": {"vllm": {}}}, "vllm.url"),
        ({"rollout": {"vllm": {"url": "http://x/v1", "model": "m", "tensor": 2}}}, "vllm.tensor"),
        ({"rollout": {"vllm": {"url": "http://x/v1", "model": "m"}, "temperature": 3.0}}, "temperature"),
        ({"rollout": {"vllm": {"url": "http://x/v1", "model": "m"}}, "adapter": {"kind": "ia3"}}, "adapter.kind"),
        (
            {"rollout": {"vllm": {"url": "http://x/v1", "model": "m"}}, "adapter": {"kind": "lora", "dora": True}},
            "adapter.dora",
        ),
        (
            {"rollout": {"vllm": {"url": "http://x/v1", "model": "m"}}, "model": {"name": "m", "add_tokens": ["<x>"]}},
            "model.add_tokens: .*the server has the tokens",
        ),
    ],
)
def test_what_it_cannot_be_told_is_refused(more, key, tiny, tmp_path):
    with pytest.raises(RecipeError, match=key):
        maker(tiny, tmp_path)(tmp_path / "run", **more)
