"""Helpers: what they make is what one process makes; one that dies or hangs is named, and nothing is left out."""

import datetime
import json
import os
import signal
import threading
import time
from dataclasses import fields

import numpy as np
import pytest

from llmkit.core.errors import DataError, RecipeError, ResourceError
from llmkit.data import helpers
from llmkit.data.chunk import Chunk, Law, chunk
from llmkit.data.node import Data, Jsonl
from llmkit.data.render import Renderer
from llmkit.data.rows import Raw
from llmkit.data.wire import packed_chunk, packed_rows, read_chunk, read_rows


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks of few rows, and helpers from the second one on."""
    monkeypatch.setattr(helpers, "ROWS", 8)
    monkeypatch.setattr(helpers, "ALONE", 1)


@pytest.fixture
def path(tmp_path):
    lines = []
    for i in range(100):
        said = [{"role": "user", "content": f"hello {i} <|im_end|>" if i % 9 == 0 else f"hello {i}"}]
        said.append({"role": "assistant", "content": "" if i % 13 == 0 else "lazy dog é ✓ " * (1 + i % 30)})
        lines.append("{torn" if i % 31 == 5 else json.dumps({"messages": said, "cluster": None if i % 2 else f"c{i}"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "rows.jsonl")


def law(path, **more):
    return Law(Data(train=(Jsonl(path=path),), max_length=64, on_bad_row="quarantine", **more), {}, True, strict=False)


def made(path, tokenizer, monkeypatch, many, told=None, rows=None):
    monkeypatch.setenv("LLMKIT_HELPERS", str(many))
    rows = Jsonl(path=path).rows() if rows is None else iter(rows)
    return list(helpers.chunks(rows, told or law(path), Renderer(tokenizer)))


def plain(one):
    held = {f.name: getattr(one, f.name) for f in fields(Chunk)}
    held |= {"ids": one.ids.tolist(), "weights": one.weights.tolist()}
    return held | {"bad": [(str(b), b.text, tuple(b.at)) for b in one.bad]}


@pytest.mark.parametrize("overflow", ["drop", "split"])
@pytest.mark.parametrize("many", [1, 3])
def test_helpers_make_what_one_process_makes(many, overflow, path, tokenizer, monkeypatch):
    told, asked, real = law(path, overflow=overflow), [], helpers.Helper._asked
    monkeypatch.setattr(helpers.Helper, "_asked", lambda self, work: asked.append(work.base) or real(self, work))
    alone = made(path, tokenizer, monkeypatch, 0, told)
    assert not asked and len(alone) == 13
    beside = made(path, tokenizer, monkeypatch, many, told)
    assert asked and list(map(plain, beside)) == list(map(plain, alone))
    assert beside[3].ids.dtype == np.int32 and beside[3].weights.dtype == np.float32
    assert not [t for t in threading.enumerate() if t.name.startswith("helper")]


def test_bytes_give_rows_and_chunks_again(path, tokenizer):
    rows = list(Jsonl(path=path).rows())[:40]
    again, base = read_rows(packed_rows(rows, 7))
    assert base == 7 and [r for r in again if isinstance(r, Raw)] == [r for r in rows if isinstance(r, Raw)]
    one = chunk(rows, 0, law(path), Renderer(tokenizer))
    assert plain(read_chunk(packed_chunk(one))) == plain(one) and one.bad


def test_values_of_kinds_of_their_own_stay_here(path, tokenizer, monkeypatch):
    day = datetime.date(2026, 1, 2)
    rows = [Raw({"prompt": f"a {i}", "completion": "dog", "tools": None, "day": day}, "f", i + 1) for i in range(40)]
    ones = made(path, tokenizer, monkeypatch, 2, rows=rows)
    assert [place for one in ones for place in one.places] == [("f", i + 1) for i in range(40)]


def test_an_error_in_a_row_is_the_same_with_helpers(path, tokenizer, monkeypatch):
    said = []
    for many in (0, 2):
        with pytest.raises(DataError) as caught:
            made(path, tokenizer, monkeypatch, many, law(path, overflow="error"))
        said.append(str(caught.value))
    assert said[0] == said[1] and "has " in said[0] and ":" in said[0]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_d11_a_helper_that_dies_or_hangs_is_named_with_its_rows(end, path, tokenizer, monkeypatch):
    monkeypatch.setattr(helpers, "DEADLINE", 0.5)
    real = helpers.Helper._asked

    def struck(self, work):
        if work.base >= 24:
            os.kill(self.pid, end)
            time.sleep(0.05)
        return real(self, work)

    monkeypatch.setattr(helpers.Helper, "_asked", struck)
    what = "died" if end == signal.SIGKILL else "has not answered for 0 s"
    pattern = rf"helper \d \(pid \d+\) {what}; it had the rows .*rows.jsonl:\d+ to .*rows.jsonl:\d+"
    with pytest.raises(ResourceError, match=pattern):
        made(path, tokenizer, monkeypatch, 2)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_helper_that_cannot_be_started_is_named_and_takes_the_others_along(path, tokenizer, monkeypatch):
    real, begun = os.fork, []

    def fork():
        if begun:
            raise OSError(11, "Resource temporarily unavailable")
        begun.append(real())
        return begun[0]

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(ResourceError, match="helper 2 cannot be started: .*unavailable; .* LLMKIT_HELPERS=1"):
        made(path, tokenizer, monkeypatch, 3)
    with pytest.raises(ChildProcessError):
        os.waitpid(begun[0], 0)


def test_who_stops_reading_leaves_no_helper(path, tokenizer, monkeypatch):
    monkeypatch.setenv("LLMKIT_HELPERS", "2")
    one = helpers.chunks(Jsonl(path=path).rows(), law(path), Renderer(tokenizer))
    next(one), next(one), next(one)
    one.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_few_rows_need_no_helper(path, tokenizer, monkeypatch):
    monkeypatch.setattr(helpers, "ALONE", 20)
    monkeypatch.setattr(helpers, "Team", None)
    assert len(made(path, tokenizer, monkeypatch, 2)) == 13
    monkeypatch.setattr(helpers, "ALONE", 1)
    with pytest.raises(RecipeError, match="LLMKIT_HELPERS: 'two' is no number"):
        made(path, tokenizer, monkeypatch, "two")
