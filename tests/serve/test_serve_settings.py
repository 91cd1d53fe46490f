"""What operators set: by flags and by a recipe of kind serve, to the same end; and that it is so on the server."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from llmkit.cli import serve as verb
from llmkit.core.errors import ModelError, RecipeError
from llmkit.inference.cache import Cache
from llmkit.inference.node import OwnEngine
from llmkit.models.load import read_tokenizer
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.serve.node import Bounds
from llmkit.serve.served import open_served
from llmkit.serve.start import Settings, check, told
from tests.serve.conftest import Running

FLAGS: dict[str, tuple[str, str, Any]] = {
    "name": ("--name mine", "name: mine", lambda s: s.name == "mine"),
    "template": ("--template chatml", "model: {name: M, template: chatml}", lambda s: s.model.template == "chatml"),
    "length": ("--max-length 64", "bounds: {length: 64}", lambda s: s.bounds.length == 64),
    "tokens": ("--max-tokens 9", "bounds: {max_tokens: 9}", lambda s: s.bounds.max_tokens == 9),
    "requests": ("--requests 7", "bounds: {requests: 7}", lambda s: s.bounds.requests == 7),
    "size": ("--cache-size 4MiB", "engine: {cache: {size: 4MiB}}", lambda s: s.engine.cache.size == 4 << 20),
    "precision": (
        "--cache-precision int8",
        "engine: {cache: {precision: int8}}",
        lambda s: s.engine.cache.precision == "int8",
    ),
    "memory": ("--memory 0.5", "engine: {cache: {memory: 0.5}}", lambda s: s.engine.cache.memory == 0.5),
    "exact": ("--exact", "engine: {exact: true}", lambda s: s.engine.exact),
    "adapters": ("--adapter a=x --adapter b=z", "adapters: {a: x, b: z}", lambda s: s.adapters == {"a": "x", "b": "z"}),
    "most": ("--most-adapters 3", "most_adapters: 3", lambda s: s.most_adapters == 3),
    "hosts": ("--allow-host a.b --allow-host c", "hosts: [a.b, c]", lambda s: s.hosts == ("a.b", "c")),
    "root": ("--adapter-root r", "adapter_root: r", lambda s: str(s.adapter_root) == "r"),
}


@pytest.fixture
def started(monkeypatch: Any, tiny: Any) -> Any:
    """The settings that a command line would start a server with."""
    from typer.testing import CliRunner

    from llmkit.cli.main import app

    seen: list[Settings] = []
    monkeypatch.setattr("llmkit.serve.start.start", lambda settings: seen.append(settings))

    def run(*words: str) -> Settings:
        result = CliRunner().invoke(app, ["serve", str(tiny), *words])
        assert result.exit_code == 0, (result.output, result.exception)
        return seen.pop()

    return run


@pytest.mark.parametrize("key", FLAGS)
def test_a_flag_and_a_recipe_set_the_same(key: str, started: Any, tiny: Any, tmp_path: Any) -> None:
    flag, line, holds = FLAGS[key]
    plain = started()
    assert not holds(plain)  # the control
    assert holds(started(*flag.split()))
    path = tmp_path / "serve.yaml"
    text = line.replace("name: M", f"name: {tiny}") if line.startswith("model") else f"model: {tiny}\n{line}"
    path.write_text(f"kind: serve\nout: {tmp_path}\n{text}\n")
    assert holds(started("--recipe", str(path)))


def test_a_wrong_value_names_its_key(tiny: Any) -> None:
    with pytest.raises(RecipeError, match=r"engine.cache.precision"):
        verb._node(str(tiny), "", {"engine.cache.precision": "int7"})
    with pytest.raises(RecipeError, match=r"engine.cache.memory"):
        verb._node(str(tiny), "", {"engine.cache.memory": 2.0})


def test_the_engine_has_the_cache_that_was_set(tiny: Any) -> None:
    ref = ModelRef(name=str(tiny))

    def blocks(**cache: Any) -> int:
        how = OwnEngine(sequences=2, cache=Cache(size=1 << 20, **cache))
        return int(open_served(told(Settings(ref, engine=how))).engine.scheduler.blocks.count)

    plain = blocks()
    assert blocks(precision="bf16") in (2 * plain, 2 * plain + 1) and blocks(precision="int8") > 2.5 * plain


def test_the_server_s_own_template_renders_what_is_asked(llm: Any, tiny: Any, tmp_path: Any) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]")
    ref = ModelRef(name=str(tiny), template=str(path))
    own = type("Own", (), {"loaded": llm.loaded, "tokenizer": read_tokenizer(resolve(ref), ref, False)})()
    server = Running(own, name="tiny", bounds=Bounds(length=64))
    try:
        asked = {"messages": [{"role": "user", "content": "hi"}]}
        said = httpx.post(server.url + "/tokenize", json=asked, timeout=30).json()
        text = httpx.post(server.url + "/detokenize", json={"tokens": said["tokens"]}, timeout=30).json()
        assert text["content"] == "[user] hi\n[assistant]" and said["max_model_len"] == 64
        long = {"prompt": [5] * 64, "max_tokens": 1}
        assert httpx.post(server.url + "/v1/completions", json=long, timeout=30).json()["error"]["param"] == "prompt"
        for key, value in (("chat_template", "{{ 1 }}"), ("chat_template_kwargs", {"enable_thinking": False})):
            body = asked | {key: value, "max_tokens": 1}
            refused = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=30)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, key)  # a client's own never does
    finally:
        server.stop()


def test_a_deadline_may_be_told_by_a_header_and_the_body_s_goes_before_it(server: Any) -> None:
    def status(header: str, **more: Any) -> tuple[int, Any]:
        asked = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2} | more
        said = httpx.post(server.url + "/v1/chat/completions", json=asked, headers={"x-deadline": header}, timeout=30)
        return said.status_code, said.json().get("error", {}).get("param")

    assert status("0.000000001") == (408, "deadline") and status("60") == (200, None)
    assert status("0") == status("60", deadline=0) == (408, "deadline")  # nobody waits: it is no way around a bound
    assert status("0.000000001", deadline=60) == (200, None)
    texts = {"json": {"input": "a"}, "timeout": 30}
    embedded = [httpx.post(server.url + "/v1/embeddings", headers={"x-deadline": at}, **texts) for at in ("0", "60")]
    assert [said.status_code for said in embedded] == [408, 200] and not server.engine.calls
    for wrong in ("soon", "-1", "1e9", "999999", "nan"):
        assert status(wrong) == (400, "x-deadline")


def test_an_adapter_that_is_called_as_the_model_is_refused() -> None:
    """Nobody could ask for it: its name would be the model's."""
    for name in ("", "mine"):
        own = Settings(ModelRef(name="m"), name=name, adapters={name or "m": "folder"})
        with pytest.raises(RecipeError, match="is the model's own name too"):
            check(own)


def test_a_length_beyond_the_model_s_is_told(llm: Any, caplog: pytest.LogCaptureFixture) -> None:
    for length, lines in ((1_000_000, 1), (8, 0)):
        caplog.clear()
        running = Running(llm, bounds=Bounds(length=length))
        running.stop()
        assert sum("more than the model takes" in record.getMessage() for record in caplog.records) == lines


def test_an_adapter_without_a_folder_is_named_before_anything_is_started(tiny: Any) -> None:
    with pytest.raises(ModelError, match="adapters.a: /nope is no folder that there is"):
        check(Settings(ModelRef(name=str(tiny)), adapters={"a": "/nope"}))
