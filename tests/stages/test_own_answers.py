"""A model's own answers: what the engine says to each prompt, made once whatever interrupts it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmkit import LLM, Sampling
from llmkit.core.console import Console
from llmkit.core.errors import DataError
from llmkit.core.metrics import Lines
from llmkit.core.run import Run
from llmkit.core.stop import Stop
from llmkit.data.node import Data
from llmkit.data.prepared import Prepared
from llmkit.data.prompted import prompts
from llmkit.data.source_nodes import Jsonl
from llmkit.models.node import ModelRef
from llmkit.stages.answers import own_answers
from llmkit.train.answers import Own
from tests.conftest import make_tokenizer

HOW = Own(sampling=Sampling(max_tokens=6, temperature=0.8, seed=3))


def asked(rows: Path, longest: int = 96, take: int = 8) -> Prepared:
    source = Jsonl(path=str(rows), take=take)
    return prompts([source], Data(train=(source,), max_length=longest), make_tokenizer())


def made(tiny: Path, asked: Prepared, folder: Path, longest: int = 96, how: Own = HOW) -> Prepared:
    run = Run(folder, 0, "cpu", 1, "", Console(quiet=True), Stop())
    return own_answers(asked, how, ModelRef(name=str(tiny)), "fp32", longest, run, "data.train")


def texts(prepared: Prepared) -> list[tuple[list[int], list[float]]]:
    return [tuple(part.tolist() for part in prepared.example(at)) for at in range(len(prepared))]  # type: ignore[misc]


def test_they_are_what_the_engine_says_to_each_prompt(tiny: Path, rows: Path, tmp_path: Path) -> None:
    before = asked(rows)
    found, llm = made(tiny, before, tmp_path), LLM(str(tiny))
    for at, (ids, weights) in enumerate(texts(found)):
        prompt = before.example(at)[0].tolist()
        said = llm.generate([prompt], HOW.sampling)[0]
        answer = list(said.token_ids) + [2] * (said.finish_reason == "stop")
        assert ids == prompt + answer
        assert weights == [0.0] * len(prompt) + [1.0] * len(answer)
    assert found.counts["supervised tokens"] == sum(sum(weights) for _, weights in texts(found))
    assert len(found) == len(before) == 8


def test_the_token_that_ended_an_answer_is_the_one_that_did(tiny: Path, rows: Path, tmp_path: Path) -> None:
    """Of a model with several (Gemma has two): not the tokenizer's own."""
    model = Path(shutil.copytree(tiny, tmp_path / "several"))
    config = json.loads((model / "generation_config.json").read_text())
    ends = list(range(2, 200))
    (model / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
    before = asked(rows)
    last = {ids[-1] for ids, weights in texts(made(model, before, tmp_path)) if sum(weights) < HOW.sampling.max_tokens}
    assert last and last <= set(ends) - {2}


def test_what_was_made_before_is_not_made_again_and_the_rest_is_the_same(
    tiny: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(tiny, asked(rows), tmp_path)
    path = tmp_path / "answers.data.train.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:-3])  # torn in the midst of a line
    added: list[Any] = []
    plain = Lines.add
    monkeypatch.setattr(Lines, "add", lambda self, line: (added.append(line), plain(self, line)))
    again = made(tiny, asked(rows), tmp_path)
    assert len(added) == 5
    assert texts(again) == texts(whole)
    assert again.digest == whole.digest
    assert path.read_bytes() == b"".join(lines)


def test_other_prompts_or_another_sampling_make_all_anew(tiny: Path, rows: Path, tmp_path: Path) -> None:
    first = made(tiny, asked(rows), tmp_path)
    fewer = made(tiny, asked(rows, take=3), tmp_path)
    assert texts(fewer) == texts(first)[:3]
    other = made(tiny, asked(rows, take=3), tmp_path, how=replace(HOW, sampling=replace(HOW.sampling, seed=4)))
    assert texts(other) != texts(fewer)
    assert len((tmp_path / "answers.data.train.jsonl").read_text().splitlines()) == 4


def test_prompts_and_answers_are_no_longer_than_the_data(tiny: Path, rows: Path, tmp_path: Path) -> None:
    lengths = [asked(rows).length(at) for at in range(8)]
    bound = sorted(lengths)[5] + 1
    short = asked(rows, bound)
    assert len(short) == sum(length < bound for length in lengths) < 8
    assert short.counts["too long: no room for an answer"] == 8 - len(short)
    found = made(tiny, short, tmp_path, bound)
    assert max(found.length(at) for at in range(len(found))) == bound


def test_rows_that_ask_nothing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "only a text"}) + "\n")
    with pytest.raises(DataError, match="nothing is asked"):
        asked(path)
