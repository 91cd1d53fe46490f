"""`generate` and `chat`: every field of Sampling, answers as JSON, a conversation that can be begun anew."""

from __future__ import annotations

import io
import json
import os
import signal
from typing import Any

import pytest
from peft import LoraConfig

from llmkit.build.llm import LLM
from llmkit.cli import chat as talking
from llmkit.cli.main import _guarded
from llmkit.cli.text import Asking, generate
from llmkit.core.errors import RecipeError
from llmkit.inference.sampling import Sampling
from tests.build.test_adapters_of import folder


def test_every_field_of_sampling_can_be_said_and_a_wrong_one_is_named(tiny: Any, capsys: Any) -> None:
    more = ("logprobs=2", "min_tokens=3", "logit_bias={5: 1.5}")
    generate(Asking(str(tiny), {"max_tokens": 4, "n": 2, "temperature": 1.0}, more), "hello", True)
    said = json.loads(capsys.readouterr().out)
    llm = LLM(str(tiny))
    how = Sampling(max_tokens=4, n=2, temperature=1.0, logprobs=2, min_tokens=3, logit_bias={5: 1.5})
    made = llm.chat([{"role": "user", "content": "hello"}], how)
    assert [one["text"] for one in said["outputs"]] == [one.text for one in made.outputs]
    assert said["token_ids"] == list(made.token_ids) and len(said["logprobs"]) == len(made.token_ids) >= 3
    with pytest.raises(Exception, match="top_q: unknown key, did you mean top_"):
        generate(Asking(str(tiny), {}, ("top_q=1",)), "hello", True)


def said(monkeypatch: Any, *lines: str) -> None:
    left = iter((*lines, ""))
    monkeypatch.setattr("builtins.input", lambda *_: next(left))


def test_a_conversation_goes_on_is_forgotten_and_told(tiny: Any, monkeypatch: Any, capsys: Any) -> None:
    llm, how = LLM(str(tiny)), Sampling(max_tokens=5)

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    first = llm.chat([user("hello")], how).text
    second = llm.chat([user("hello"), {"role": "assistant", "content": first}, user("world")], how).text
    system = llm.chat([{"role": "system", "content": "the dog"}, user("hello")], how).text
    said(monkeypatch, "hello", "world", "/reset", "hello", "/reset", "/system the dog", "hello", "/adapter x", "/wrong")
    talking.chat(Asking(str(tiny), {"max_tokens": 5}))
    told = "no adapter is named x (none is loaded)\n/wrong is no command; /help lists them\n"
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n{system}\n{told}"


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_chat_that_is_left_at_its_prompt_just_ends(tiny: Any, monkeypatch: Any, capsys: Any, end: Any) -> None:
    def left(*_: str) -> str:
        raise end

    monkeypatch.setattr("builtins.input", left)
    talking.chat(Asking(str(tiny), {"max_tokens": 5}))
    assert capsys.readouterr().out == ""


def test_what_is_too_long_is_told_and_the_chat_goes_on(tiny: Any, monkeypatch: Any, capsys: Any) -> None:
    first = LLM(str(tiny)).chat([{"role": "user", "content": "hello"}], Sampling(max_tokens=5)).text
    said(monkeypatch, "hello world " * 400, "hello")
    talking.chat(Asking(str(tiny), {"max_tokens": 5}))
    told, answer = capsys.readouterr().out.split("\n", 1)
    assert "512" in told and told.endswith("/reset forgets what was said") and answer == first + "\n"


def test_an_answer_that_fails_is_told_and_the_chat_goes_on(tiny: Any, monkeypatch: Any, capsys: Any) -> None:
    said(monkeypatch, "hello", "hello")
    talking.chat(Asking(str(tiny), {"max_tokens": 4, "min_tokens": 2, "allowed_ids": [2]}))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and told[0] == told[1] and "the answer failed: " in told[0] and "no token" in told[0]


def test_adapters_that_are_named_answer_by_turns(tiny: Any, tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    lora = folder(tiny, tmp_path / "lora", LoraConfig(r=4, target_modules=["o_proj", "down_proj"]))
    drawn: Any = {"max_tokens": 9, "temperature": 1.0, "seed": 3}
    llm, how = LLM(str(tiny), adapters={"own": str(lora)}), Sampling(**drawn)
    plain, other = (llm.chat([{"role": "user", "content": "hello"}], how, adapter=name).text for name in ("", "own"))
    said(monkeypatch, "hello", "/reset", "/adapter own", "hello", "/reset", "/adapter", "hello")
    talking.chat(Asking(str(tiny), drawn, adapters={"own": str(lora)}))
    assert capsys.readouterr().out == f"{plain}\n{other}\n{plain}\n" and plain != other


def test_ctrl_c_ends_an_answer_and_not_the_chat(tiny: Any, monkeypatch: Any, capsys: Any) -> None:
    whole = LLM(str(tiny)).chat([{"role": "user", "content": "hello"}], Sampling(max_tokens=200)).text
    real, steps = LLM.stream, []

    def interrupted(self: LLM, *args: Any, **more: Any) -> Any:
        for piece in real(self, *args, **more):
            steps.append(piece)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    monkeypatch.setattr(LLM, "stream", interrupted)
    said(monkeypatch, "hello", "/help")
    talking.chat(Asking(str(tiny), {"max_tokens": 200}))
    out = capsys.readouterr().out
    assert len(steps) == 3 and out.endswith("\n" + talking.HELP)
    assert whole.startswith(out.removesuffix("\n" + talking.HELP)) and len(out) < len(whole) + len(talking.HELP)
    with pytest.raises(KeyboardInterrupt):  # the control: it is noted no longer
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


@pytest.mark.parametrize("flag", ["generator", "placement"])
def test_yaml_that_is_broken_names_its_flag(tiny: Any, flag: str) -> None:
    with pytest.raises(RecipeError, match=rf"^--{flag}:2:1: .*; fix: mend the YAML here"):
        Asking(str(tiny), {}, **{flag: "{kind: engine"}).open()


@pytest.mark.parametrize("verb", ["generate", "chat", "file"])
def test_memory_that_gives_out_is_named_as_such(
    verb: str, tiny: Any, tmp_path: Any, monkeypatch: Any, capfd: Any
) -> None:
    def short(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "hi"}\n')
    words = {"generate": ["hi"], "chat": [], "file": ["--input", str(rows), "--output", str(tmp_path / "o.jsonl")]}
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    command = ["chat" if verb == "chat" else "generate", str(tiny), *words[verb], "--max-tokens", "2"]
    assert _guarded(command, False) == 0  # the control
    (tmp_path / "o.jsonl").unlink(missing_ok=True)
    monkeypatch.setattr(LLM, "generate" if verb == "generate" else "stream", short)
    monkeypatch.setattr("llmkit.cli.batch.Asked.answered", short)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    capfd.readouterr()
    assert _guarded(command, False) == 5
    said = capfd.readouterr().err
    assert "memory gave out" in said and "MiB are free" in said and "fix: ask for fewer" in said
