"""Streams: each row once a pass, a function of seed and place, and runs that go on exactly where they were killed."""

import json
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest

from llmkit.adapters.node import Lora
from llmkit.cli.inspect import inspect
from llmkit.core.errors import DataError
from llmkit.core.metrics import Lines
from llmkit.data import stream
from llmkit.data.feed import Streams
from llmkit.data.mix import Mix
from llmkit.data.node import Data, Jsonl
from llmkit.stages import build_training as stage
from llmkit.train.node import Evaluating
from tests.faults import go, in_child, killed_after, outcome, sft


def write(path, count, bad=()):
    rows = [
        {"prompt": f"{path.stem} {i} ", "completion": "" if i in bad else "lazy dog " * (1 + i % 7)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path / "a.jsonl", 50), write(tmp_path / "b.jsonl", 23)]


def data(files, weights=(None,), **more):
    sources = tuple(Jsonl(path=str(path), weight=weight) for path, weight in zip(files, weights, strict=False))
    return Data(train=sources, streaming=True, **({"buffer": 8} | more))


def streams(told, tokenizer, per_step=5, steps=100, seed=0, state=None, aside=None):
    made = Streams(told, tokenizer, seed, per_step, steps, aside)
    made.begin(state or {})
    return made


def seen(drawn):
    return [(place, drawn.data.example(i)[0].tolist()) for i, place in enumerate(drawn.data.places)]


def test_c11_each_row_is_seen_once_a_pass_shuffled_within_the_buffer(files, tokenizer):
    made = streams(data(files[:1]), tokenizer)
    lines = [line for step in range(20) for (_, line), _ in seen(made.step(step))]
    first, second = lines[:50], lines[50:]
    assert sorted(first) == sorted(second) == list(range(1, 51)) and first != second
    windows = [first[at : at + 8] for at in range(0, 48, 8)]
    assert all(sorted(one) == list(range(8 * i + 1, 8 * i + 9)) for i, one in enumerate(windows))
    assert any(one != sorted(one) for one in windows)
    assert [made.step(20).epoch, streams(data(files[:1]), tokenizer).step(0).epoch] == [2, 0]
    assert [
        line for step in range(10) for (_, line), _ in seen(streams(data(files[:1]), tokenizer, seed=1).step(0))
    ] != lines


@pytest.mark.parametrize(
    "weights", [(None,), (2.0, 1.0), (((0.0, 1.0), (1.0, 0.1)), ((0.0, 0.0), (1.0, 1.0)))], ids=str
)
@pytest.mark.parametrize("at", [1, 7, 13, 29])
def test_from_any_step_on_it_goes_on_as_it_would_have(at, weights, files, tokenizer):
    told = data(files, weights)
    whole = streams(told, tokenizer)
    rest = []
    for step in range(40):
        if step == at:
            state = json.loads(json.dumps(whole.state(step)))
        rest.append(seen(whole.step(step)))
    other = streams(told, tokenizer, state=state)
    assert [seen(other.step(step)) for step in range(at, 40)] == rest[at:]
    assert other.counts() == whole.counts()


def test_a_step_that_was_dropped_begins_where_it_began(files, tokenizer):
    made = streams(data(files, (1.0, 1.0)), tokenizer)
    for step in range(6):
        before = made.state(step)
        drawn = seen(made.step(step))
    assert made.state(5) == before != made.state(6)
    assert seen(made.step(5)) == drawn
    with pytest.raises(ValueError, match="step 9"):
        made.step(9)


def test_begun_anew_it_gives_its_first_steps_and_opens_nothing_twice(files, tokenizer, monkeypatch):
    opened, real = [], Jsonl.rows
    monkeypatch.setattr(Jsonl, "rows", lambda self, after=(): opened.append(self.path) or real(self, after))
    made = streams(data(files, (1.0, 1.0)), tokenizer)
    made.begin({})
    assert len(opened) == 2 * 2  # each place is opened, and each first window
    first = [seen(made.step(step)) for step in range(3)]
    made.begin({})
    assert made.state(0)["streams"] == [{**vars(stream.Place())}] * 2
    assert [seen(made.step(step)) for step in range(3)] == first


def test_a_start_that_draws_from_streams_leaves_them_at_their_beginning(tiny, files, tmp_path):
    told = data(files[:1], max_length=64)
    node = replace(
        sft(tiny, files[0], tmp_path / "run"),
        steps=3,
        data=told,
        adapter=Lora(rank=2, init="eva"),
        evaluate=Evaluating(),
    )
    manifest = go(node).manifest
    assert manifest["samples"] == manifest["counts"]["rows"] == 24  # and not those that `init` looked at


def test_what_is_read_to_go_on_does_not_grow_with_the_place(files, tokenizer, monkeypatch):
    read, real = [], Jsonl.rows

    def counted(self, after=()):
        for row in real(self, after):
            read.append(row.line)
            yield row

    monkeypatch.setattr(Jsonl, "rows", counted)
    made = streams(data(files[:1]), tokenizer)
    for step in range(7):
        made.step(step)
    state = made.state(7)
    time.sleep(0.2)
    del read[:]
    other = streams(data(files[:1]), tokenizer, state=state)
    other.step(7)
    other.streams[0]._ahead.thread.join()
    assert min(read) > 32 and len(read) <= 18


def test_shares_of_streams_are_as_asked(files, tokenizer):
    made = streams(data(files, (3.0, 1.0), mix=Mix(by="rows")), tokenizer)
    names = Counter(place[0][-7] for step in range(80) for place, _ in seen(made.step(step)))
    assert names == {"a": 300, "b": 100}


def test_rows_are_counted_and_judged_as_they_come(tmp_path, tokenizer):
    path, kept = write(tmp_path / "a.jsonl", 50, bad=(3, 20)), []
    told = data([path], bad_share=0.2, on_bad_row="quarantine")
    made = streams(told, tokenizer, aside=kept.append)
    lines = [line for step in range(19) for (_, line), _ in seen(made.step(step))]
    assert Counter(lines[:48]) == Counter(set(range(1, 51)) - {4, 21})
    assert made.counts()["unusable: completion is blank"] >= 3  # of two passes
    assert [bad.problems[0].line for bad in kept] == [4, 21]
    with pytest.raises(DataError, match=r"data\.train\.0: 1 of 8 rows cannot be used .*a.jsonl:4: completion is blank"):
        streams(replace(told, bad_share=0.1), tokenizer)
    late = write(tmp_path / "late.jsonl", 50, bad=range(24, 50))
    made = streams(data([late], bad_share=0.2), tokenizer)
    with pytest.raises(DataError, match=r"of 32 rows cannot be used"):
        for step in range(20):
            made.step(step)


@pytest.mark.parametrize(
    "count,bad,said",
    [
        (0, (), "holds no rows"),
        (9, range(9), "no row is left to learn from"),
        (3, (), "3 examples do not fill one step of 5"),
    ],
)
def test_d5_too_few_rows_are_told_before_a_step(count, bad, said, tmp_path, tokenizer):
    with pytest.raises(DataError, match=said):
        streams(data([write(tmp_path / "a.jsonl", count, bad)], bad_share=1.0), tokenizer)


def test_a_broken_row_ends_the_run_where_its_window_begins(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", 30)
    path.write_text(path.read_text() + '{"prompt": "x')
    made = streams(data([path]), tokenizer)
    with pytest.raises(DataError, match=r"a.jsonl:31: is torn off"):
        for step in range(7):
            made.step(step)
    assert made.next == 4  # the four steps before are whole


def test_d11_a_source_that_does_not_answer_is_named_with_its_last_row(files, tokenizer, monkeypatch):
    real, gate = Jsonl.rows, threading.Event()

    def hangs(self, after=()):
        for row in real(self, after):
            if row.line == 20:
                gate.wait(30)
            yield row

    monkeypatch.setattr(Jsonl, "rows", hangs)
    monkeypatch.setattr(stream, "DEADLINE", 0.3)
    made = streams(data(files[:1]), tokenizer)
    with pytest.raises(DataError, match=r"data\.train\.0: gave no rows for 0 s; the last one read is .*a.jsonl:16"):
        for step in range(20):
            made.step(step)
    gate.set()


def test_no_row_is_read_before_it_is_needed(tiny, files, tmp_path, monkeypatch):
    read, real = [], Jsonl.rows

    def counted(self, after=()):
        for row in real(self, after):
            read.append(row.line)
            yield row

    monkeypatch.setattr(Jsonl, "rows", counted)
    told = {"train": [{"kind": "jsonl", "path": str(files[0])}], "streaming": True, "buffer": 8}
    go(sft(tiny, files[0], tmp_path / "run", data=told, steps=2, batch={"rows": 3}, evaluate={}))
    assert max(read) <= 16
    line = Lines(tmp_path / "run" / "metrics.jsonl").read()[-2]
    assert (line["rows_read"], line["rows_unusable"]) == (8, 0)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["samples"] == 6 and manifest["counts"]["rows"] == 8
    assert list(manifest["data_files"]) == [str(files[0])]


def mixed(tiny, files, out, **more):
    train = [{"kind": "jsonl", "path": str(path), "weight": 1.0 + i} for i, path in enumerate(files)]
    told = {"train": train, "streaming": True, "buffer": 8, "valid": [{"kind": "jsonl", "path": str(files[1])}]}
    seen = {"every": 6, "rows": 4, "samples": 1, "max_tokens": 2}
    said = {"steps": 12, "batch": {"rows": 5}, "evaluate": seen, "checkpoint": {"every": 3}}
    return sft(tiny, files[0], out, data=told, **(said | more))


@pytest.fixture
def ledger(monkeypatch):
    """The places that each step saw."""
    seen, real = {}, stage._step_data

    def noted(job, contexts, index):
        made = real(job, contexts, index)
        seen[index] = made.places
        return made

    monkeypatch.setattr(stage, "_step_data", noted)
    return seen


def test_c11_the_ledger_of_a_run_has_each_row_once_a_pass(tiny, files, tmp_path, ledger):
    go(mixed(tiny, files, tmp_path / "run", steps=15))
    places = [place for index in range(15) for place in ledger[index]]
    for path, count in zip(files, (50, 23), strict=True):
        own = [line for file, line in places if file == str(path)]
        passes = [own[at : at + count] for at in range(0, len(own), count)]
        assert all(len(set(one)) == len(one) for one in passes) and len(own) > 20


@pytest.mark.parametrize("step", [1, 5, 8])
def test_c11_a_killed_run_over_streams_ends_as_if_it_had_not_been(step, tiny, files, tmp_path):
    go(mixed(tiny, files, tmp_path / "whole"))
    died = in_child(lambda: killed_after(step, lambda: go(mixed(tiny, files, tmp_path / "killed"))))
    assert died == -signal.SIGKILL
    go(mixed(tiny, files, tmp_path / "killed"))
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_c13_another_file_or_buffer_is_named_on_resume(tiny, files, tmp_path):
    in_child(lambda: killed_after(5, lambda: go(mixed(tiny, files, tmp_path / "run"))))
    write(files[1], 29)  # it validates too
    with pytest.raises(Exception, match=r"files.*b.jsonl"):
        go(mixed(tiny, files, tmp_path / "run"))


def test_streams_need_steps_and_refuse_what_reads_them_whole(tiny, files, tmp_path):
    for more, said in (
        ({"steps": None}, "data.streaming: .*how long a stream is, is not known"),
        ({"data": {"dedup": {"kind": "exact"}}}, "dedup: .*would read the whole stream"),
        ({"data": {"held_out": {"share": 0.1}}}, "held_out: .*would read the whole stream"),
        ({"data": {"mix": {"stop": "first_exhausted"}}}, "mix.stop: .*an epoch ends is not known of streams"),
        ({"data": {"lint": {"level": "error"}}}, "lint.level: .*a stream is linted by"),
    ):
        told = {"train": [{"kind": "jsonl", "path": str(files[0])}], "streaming": True, **more.get("data", {})}
        with pytest.raises(Exception, match=said):
            sft(tiny, files[0], tmp_path / "run", **({"steps": 3} | more | {"data": told}))


def test_check_looks_at_the_beginning_of_each_stream(tiny, files, tmp_path, capsys, monkeypatch):
    read, real = [], Jsonl.rows

    def counted(self, after=()):
        for row in real(self, after):
            read.append(row.line)
            yield row

    monkeypatch.setattr(Jsonl, "rows", counted)
    inspect("", replace(mixed(tiny, files, tmp_path / "run"), evaluate=Evaluating()), 0)
    assert "data.train (the first 8 rows of each stream): 16 rows, 16 examples" in capsys.readouterr().out
    assert read[:16] == [*range(1, 9), *range(1, 9)] and not (tmp_path / "run").exists()
