"""Texts that look as they must, whatever the model would say."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from llmkit.core.errors import RecipeError
from llmkit.inference import grammars as module
from llmkit.inference.answers import Answers
from llmkit.inference.check import Facts
from llmkit.inference.grammar import Choice, Grammar, JsonObject, JsonSchema, Lark, Regex
from llmkit.inference.grammars import Grammars
from llmkit.inference.request import Busy, Request, RequestError
from llmkit.inference.sampler import choose, pick
from llmkit.inference.sampling import Sampling
from llmkit.inference.text import Texts
from tests.conftest import make_tokenizer
from tests.inference.schemas import ALL, REFUSED, record

WORDS, END = 448, 2
FACTS = Facts(WORDS, 512, (END,))


@cache
def texts() -> Texts:
    return Texts(make_tokenizer())


@cache
def closing() -> np.ndarray:
    """What a random model is nudged to: the letters that bring JSON to an end."""
    nudge = np.zeros(WORDS, np.float32)
    for letter, by in {'"': 3, "}": 3, "]": 3, ",": 1, ":": 1, "0": 1}.items():
        nudge[texts().tokenizer.encode(letter)[0]] = by
    return nudge


def written(grammar: Grammar, seed: int = 0, most: int = 250, **more: Any) -> tuple[str, bool]:
    """What a model of random logits makes under a grammar, and whether it came to an end."""
    sampling = Sampling(temperature=1.0, seed=seed, grammar=grammar, max_tokens=most, **more)
    steer = Answers(Request("a", (5,), sampling), FACTS, texts()).steer(0)
    numbers = np.random.default_rng(seed)
    while len(steer.made) < most:
        token = pick(numbers.standard_normal(WORDS).astype(np.float32) * 2 + closing(), steer)
        if token.id == END:
            return texts().tokenizer.decode(steer.made), True
        steer.take(token.id)
    return texts().tokenizer.decode(steer.made), False


def test_every_text_that_ends_is_valid() -> None:
    assert len(ALL) >= 100
    ended, formats = 0, jsonschema.FormatChecker()
    for at, schema in enumerate(ALL):
        for seed in (at, 1000 + at):
            text, whole = written(JsonSchema.of(schema), seed)
            ended += whole
            if whole:
                jsonschema.validate(json.loads(text), schema, format_checker=formats)
    assert ended > 1.8 * len(ALL)


@pytest.mark.parametrize("what", REFUSED)
def test_a_keyword_that_cannot_be_enforced_is_named(what: str) -> None:
    for schema in (REFUSED[what], record(inner=REFUSED[what])):
        with pytest.raises(RequestError) as refused:
            texts().matcher(JsonSchema.of(schema), WORDS, (END,))
        assert ("minlength" if what == "misspelt" else what) in str(refused.value)
        if not isinstance(schema.get("properties", {}).get("inner"), dict):
            with pytest.raises(RequestError):
                texts().matcher(Lark(grammar="start: %json " + json.dumps(schema)), WORDS, (END,))


def test_other_grammars() -> None:
    for seed in range(6):
        assert re.fullmatch("[a-f]{1,4}(-[0-9]+)?", written(Regex(pattern="[a-f]{1,4}(-[0-9]+)?"), seed)[0])
        assert written(Choice(choices=("yes", "no", 'a "b"\n', "日本😀", "yesterday")), seed)[0] in (
            *("yes", "no", 'a "b"\n', "日本😀", "yesterday"),
        )
        text, whole = written(JsonObject(), seed)
        assert not whole or isinstance(json.loads(text), dict)
        text, whole = written(Lark(grammar='start: "(" start ")" | /[xy]/'), seed)
        assert not whole or (re.fullmatch(r"\(*[xy]\)*", text) and text.count("(") == text.count(")"))
    for wrong in (Regex(pattern="(a"), Lark(grammar='start: "a" | there'), Choice()):
        with pytest.raises(RequestError):
            texts().matcher(wrong, WORDS, (END,))


def test_the_end_comes_only_where_the_grammar_ends() -> None:
    how = Sampling(grammar=Regex(pattern="ab?"), max_tokens=9)
    steer = Answers(Request("a", (5,), how), FACTS, texts()).steer(0)
    wants_end = np.zeros(WORDS, np.float32)
    wants_end[END] = 9
    made = []
    for _ in range(2):
        made.append(pick(wants_end, steer).id)
        steer.take(made[-1])
    assert texts().tokenizer.decode(made[:1]) == "a" and made[1] == END
    at = {letter: texts().tokenizer.encode(letter)[0] for letter in "ab"}
    for more in ({"min_tokens": 8}, {"ignore_eos": True}):  # they hold as long as the grammar has room
        own = Sampling(grammar=Regex(pattern="ab?"), max_tokens=9, **more)
        steer = Answers(Request("a", (5,), own), FACTS, texts()).steer(0)
        made = []
        for _ in range(3):
            made.append(pick(wants_end, steer).id)
            steer.take(made[-1])
        assert made == [at["a"], at["b"], END]
    for more in ({"stop": ("a",)}, {"stop_ids": (3,)}):
        with pytest.raises(RecipeError, match="before its grammar does"):
            Sampling(grammar=JsonObject(), **more)


def test_states_fork_and_go_back() -> None:
    how = Sampling(grammar=Regex(pattern="(ab|cd){2}"), n=2, max_tokens=9)
    answers = Answers(Request("a", (5,), how), FACTS, texts())
    at = {letter: texts().tokenizer.encode(letter)[0] for letter in "abcd"}
    one, other = answers.steer(0), answers.steer(1)
    flat = np.zeros(WORDS, np.float32)

    def allowed(steer: Any) -> set[str]:
        left = np.flatnonzero(np.isfinite(steer.law(flat)))
        return {texts().tokenizer.decode([token]) for token in left}

    one.take(at["a"])
    third = one.fork(2)
    assert allowed(one) == {"b"} and "c" in allowed(other) and allowed(third) == {"b"}
    third.take(at["b"])
    third.take(at["c"])
    assert allowed(third) == {"d"} and allowed(one) == {"b"}
    third.back(2)
    assert allowed(third) == {"b"} and third.made == one.made


def test_a_grammar_that_leads_nowhere_is_its_request_s_error_alone() -> None:
    grammar = Sampling(grammar=Regex(pattern="ab"), bad_words=("a",))
    stuck = Answers(Request("a", (5,), grammar), FACTS, texts()).steer(0)
    free = Answers(Request("b", (5,), Sampling()), FACTS, texts()).steer(0)
    made = choose([torch.zeros(WORDS)] * 2, [stuck, free])
    assert isinstance(made[0], RequestError) and not isinstance(made[1], RequestError)


DEEP = '{"type":"object","properties":{"a":' * 5000 + "{}" + "}}" * 5000
BOMBS = {
    "deep": JsonSchema(schema=DEEP),
    "turns": JsonSchema.of({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "values": JsonSchema.of({"enum": [f"v{at}" for at in range(10**6)]}),
    "fewer values": JsonSchema.of({"enum": [f"v{at}" for at in range(90_000)]}),
    "repeats": Regex(pattern="(a{1000}){1000}"),
    "a million": Regex(pattern="x{1000000}"),
    "optional": Regex(pattern="(a?){6000}a{6000}"),
}


LONG = ("a million", "optional")  # others of their kind are in the fast set


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one in LONG)) for one in BOMBS])
def test_e4_a_bomb_is_refused_and_the_next_grammar_is_not(name: str) -> None:
    with pytest.raises(RequestError) as refused:
        texts().matcher(BOMBS[name], WORDS, (END,))
    assert refused.value.problems[0].key.startswith("grammar") and len(str(refused.value)) < 400
    assert written(Regex(pattern=f"[ab]{{{len(name)}}}"))[1]


def test_e4_harmless_ones_that_look_alike_pass() -> None:
    nested = {"$defs": {"a": record(False, x={"$ref": "#/$defs/a"})}, "$ref": "#/$defs/a"}
    for grammar in (
        Regex(pattern="(a+)+$"),
        JsonSchema.of(nested),
        JsonSchema.of({"type": "string", "maxLength": 10**9}),
    ):
        texts().matcher(grammar, WORDS, (END,))


def test_e4_the_process_that_tries_is_bounded_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Grammars(make_tokenizer(), WORDS, (END,))
    tried.matcher(Regex(pattern="a+"))
    first = tried.trial.process
    assert first is not None
    os.kill(first.pid, 9)
    first.wait()
    tried.matcher(Regex(pattern="b+"))
    assert tried.trial.process is not None and tried.trial.process.pid != first.pid
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    with pytest.raises(RequestError, match="nothing was heard"):
        tried.matcher(Regex(pattern="(a?){6000}a{6000}"))
    monkeypatch.undo()
    with pytest.raises(RequestError, match="takes more than 2 s"):
        tried.matcher(Regex(pattern="(a?){6000}a{6000}"))
    tried.trial.close()


def test_a_machine_without_room_for_a_process_refuses_for_now_and_keeps_no_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = Grammars(make_tokenizer(), WORDS, (END,))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as patched, pytest.raises(Busy, match="temporarily"):
        patched.setattr(subprocess, "Popen", full)
        tried.matcher(Regex(pattern="a+"))
    tried.matcher(Regex(pattern="a+"))
    tried.trial.close()


def test_a_process_that_holds_many_files_tries_grammars_too() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most[1] != resource.RLIM_INFINITY and most[1] < 1300:
        pytest.skip(f"no more than {most[1]} files may be open here")
    tried = Grammars(make_tokenizer(), WORDS, (END,))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(most[0], 1300), most[1]))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        tried.matcher(Regex(pattern="a+"))
        assert tried.trial.process is not None and tried.trial.process.stdout is not None
        assert tried.trial.process.stdout.fileno() > 1023
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
        tried.trial.close()


def test_half_a_letter_in_a_pattern_is_refused() -> None:
    with pytest.raises(RequestError, match="pattern: is no text"):
        texts().matcher(Regex(pattern="a\ud800"), WORDS, (END,))


def test_the_cache_is_bounded_and_spares_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Grammars(make_tokenizer(), WORDS, (END,))
    asked: list[str] = []
    monkeypatch.setattr(tried.trial, "ask", lambda source: asked.append(source) or "")
    monkeypatch.setattr(module, "KEPT", 3)
    for letter in "aabcdda":
        tried.matcher(Regex(pattern=letter))
    assert len(asked) == 5 and len(tried.kept) == 3  # the first was dropped
    monkeypatch.setattr(module, "BYTES", 100)
    tried.matcher(Regex(pattern="e" * 80))
    assert len(tried.kept) == 1 and tried.bytes == next(iter(tried.kept.values()))[1]


def test_a_model_that_cannot_end_or_say_its_bytes_is_refused() -> None:
    with pytest.raises(RequestError, match="no token that ends"):
        Grammars(make_tokenizer(), WORDS, ())
    with pytest.raises(RequestError, match="which bytes"):
        Grammars(object(), WORDS, (END,))
