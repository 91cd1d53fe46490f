"""The token cache: what is made once, what is made anew, damage, rivals, and its bound."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from llmkit.core import shelf
from llmkit.core.errors import DataError, RecipeError, ResourceError
from llmkit.data import cache, chunk, lint_store
from llmkit.data.cleaning import ExactDedup, Linting
from llmkit.data.lint import Lint
from llmkit.data.mix import Mix
from llmkit.data.node import Data, Jsonl, NoPacking, Sampler
from llmkit.data.prepare import prepare
from llmkit.data.render import Renderer
from tests.conftest import CHATML, make_tokenizer


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """A cache of the test's own."""
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLMKIT_CACHE_SIZE", "1GiB")
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def made(monkeypatch):
    """The paths of sources whose rows were tokenised."""
    seen, real = [], chunk.chunk

    def watched(found, base, law, renderer):
        seen.append(found[0].file if hasattr(found[0], "file") else "")
        return real(found, base, law, renderer)

    monkeypatch.setattr(cache, "chunks", lambda rows, law, renderer: (watched(list(rows), 0, law, renderer),))
    return seen


@pytest.fixture
def files(tmp_path):
    """Two files of rows, by name."""
    for name in "ab":
        rows = [
            {"messages": [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": "hello " * i}]}
            for i in range(1, 9)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: tmp_path / name for name in "ab"}


def data(files, names="ab", weights=None, **more):
    weights = weights or {}
    return Data(train=tuple(Jsonl(path=str(files[n]), weight=weights.get(n)) for n in names), **more)


def same(one, other):
    assert len(one) == len(other) and one.digest == other.digest and one.counts == other.counts
    for index in range(len(one)):
        pairs = zip(one.example(index), other.example(index), strict=True)
        assert all(np.array_equal(mine, theirs) and mine.dtype == theirs.dtype for mine, theirs in pairs)
    assert list(one.rows) == list(other.rows) and list(one.places) == list(other.places)
    assert lint_store.state(one.lint) == lint_store.state(other.lint)


def read(told, tokenizer, **more):
    return prepare(told.train, told, tokenizer, **more)


def put(path, raw):
    """Another file under a name: who has the old one mapped keeps it."""
    path.unlink(missing_ok=True)
    path.write_bytes(raw)


def test_what_comes_from_the_cache_is_what_was_made(files, tokenizer, made, kept):
    first = read(data(files), tokenizer)
    assert len(made) == 2 and len(list(kept.glob("*/manifest.json"))) == 2
    same(read(data(files), tokenizer), first)
    assert len(made) == 2
    assert [row.id for row in first.rows] == list(range(16)) and first.rows[9].cluster == "9"
    assert first.places[-1] == (str(files["b"]), 8) and first.places[:1] == ((str(files["a"]), 1),)


def test_examples_of_several_sources_are_those_of_each_alone(files, tokenizer):
    whole, parts = read(data(files), tokenizer), [read(data(files, n), tokenizer) for n in "ab"]
    alone = [(part, index) for part in parts for index in range(len(part))]
    for index, (part, own) in enumerate(alone):
        assert all(np.array_equal(a, b) for a, b in zip(whole.example(index), part.example(own), strict=True))
        assert whole.supervised(index) == part.supervised(own) and whole.length(index) == part.length(own)
    ids = np.asarray(whole.ids)
    assert len(whole.ids) == len(ids) == whole.starts[-1] and whole.weights.sum() == np.asarray(whole.weights).sum()
    for start, end in ((0, len(ids)), (3, len(ids) - 3), (len(ids), len(ids)), (5, 5)):
        assert np.array_equal(whole.ids[start:end], ids[start:end])


def test_weights_and_new_sources_make_nothing_again(files, tokenizer, made):
    read(data(files, "a"), tokenizer)
    read(data(files, "ab"), tokenizer)
    assert made == [str(files["a"]), str(files["b"])]
    read(data(files, "ba", {"a": 3.0, "b": 1.0}, mix=Mix(temperature=2.0), dedup=ExactDedup()), tokenizer)
    assert len(made) == 2


@pytest.mark.parametrize("order", [{"length_buckets": 2}, {"sampler": Sampler(balance="label")}], ids=str)
def test_what_only_orders_examples_makes_nothing_again(order, files, tokenizer, made):
    told = data(files, "a", packing=NoPacking())
    read(told, tokenizer)
    read(replace(told, **order), tokenizer)
    assert len(made) == 1


CHANGES = {
    "rows": lambda files, told: files["a"].write_text(files["a"].read_text().replace("hello", "hallo")),
    "max_length": lambda files, told: {"max_length": 99},
    "train_on": lambda files, told: {"train_on": "all"},
    "system": lambda files, told: {"system": "be brief"},
    "overflow": lambda files, told: {"overflow": "truncate"},
    "lint": lambda files, told: {"lint": Linting(level="off")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_an_example_makes_it_again(change, files, tokenizer, made):
    told = data(files, "a")
    first = read(told, tokenizer)
    changed = CHANGES[change](files, told)
    other = read(replace(told, **changed) if isinstance(changed, dict) else told, tokenizer)
    assert len(made) == 2
    if change in ("rows", "train_on", "system"):
        assert other.digest != first.digest


def test_template_tokenizer_and_code_are_part_of_the_key(files, tokenizer, made, monkeypatch):
    told = data(files, "a")
    read(told, tokenizer)
    other = make_tokenizer(CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    read(told, other)
    more = make_tokenizer()
    more.add_tokens(["hello"])
    read(told, more)
    monkeypatch.setattr(cache, "code", lambda: {"llmkit.data": "another text"})
    read(told, tokenizer)
    assert len(made) == 4


def test_padding_and_cutting_of_a_batch_before_are_not(files, tokenizer, made):
    told, own = data(files, "a"), make_tokenizer()
    read(told, own)
    own(["a", "b c d"], padding=True, truncation=True, max_length=2)
    read(told, own)
    assert len(made) == 1


def test_s7_what_is_not_what_was_written_is_made_again(files, tokenizer, made, kept):
    told = data(files, "a")
    first = read(told, tokenizer)
    (entry,) = (path.parent for path in kept.glob("*/manifest.json"))
    for count, name in enumerate(sorted(path.name for path in entry.iterdir()), 2):
        raw = (entry / name).read_bytes()
        for bad in {raw[:-1] if raw else b"x", raw[:7] + bytes([raw[7] ^ 1]) + raw[8:] if len(raw) > 8 else raw + b"y"}:
            del made[:]
            put(entry / name, bad)
            same(read(told, tokenizer), first)
            assert len(made) == 1, (name, count)
    (entry / "more").write_bytes(b"")
    same(read(told, tokenizer), first)
    assert len(made) == 2
    (entry / "ids").unlink()
    (entry / "ids").symlink_to(files["a"])
    same(read(told, tokenizer), first)
    assert len(made) == 3


def test_s7_an_entry_under_another_ones_name_is_not_taken(files, tokenizer, made, kept):
    read(data(files, "a"), tokenizer)
    (a,) = (path.parent for path in kept.glob("*/manifest.json"))
    told = data(files, "b")
    first = read(told, tokenizer)
    (b,) = (path.parent for path in kept.glob("*/manifest.json") if path.parent != a)
    for path in b.iterdir():
        put(path, (a / path.name).read_bytes())
    same(read(told, tokenizer), first)
    assert len(made) == 3


@pytest.mark.parametrize("folder", ["cache", "tokens"])
def test_s7_a_cache_that_others_may_write_to_is_refused(folder, files, tokenizer, kept):
    read(data(files), tokenizer)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (kept, *kept.glob("[0-9a-f]*")))
    (kept if folder == "tokens" else kept.parent).chmod(0o777)
    with pytest.raises(ResourceError, match="others may write to"):
        read(data(files), tokenizer)


def test_counts_and_bad_rows_are_told_again(files, tokenizer, made):
    with files["a"].open("a") as file:
        file.write('{"prompt": "x", "completion": ""}\n{torn\n')
    told = data(files, on_bad_row="quarantine", bad_share=0.5)
    first, second = [], []
    one = read(told, tokenizer, aside=first.append)
    other = read(told, tokenizer, aside=second.append)
    same(one, other)
    assert len(made) == 2 and one.counts["quarantined"] == 1 and one.counts["unusable: completion is blank"] == 1
    assert [(str(b), b.text) for b in first] == [(str(b), b.text) for b in second] and len(first) == 2
    with pytest.raises(DataError, match="1 of 18 rows cannot be used .unusable: completion is blank"):
        read(replace(told, bad_share=0.0), tokenizer, aside=second.append)
    with pytest.raises(DataError, match="is not JSON"):
        read(replace(told, on_bad_row="error"), tokenizer)


def test_a_file_that_changes_while_it_is_read_makes_no_entry(files, tokenizer, kept, monkeypatch):
    real = cache.written

    def slow(*parts):
        files["a"].write_text(files["a"].read_text() * 2)
        return real(*parts)

    monkeypatch.setattr(cache, "written", slow)
    with pytest.raises(DataError, match="changes while it is read"):
        read(data(files, "a"), tokenizer)
    assert not list(kept.glob("*/manifest.json")) and not list(kept.glob(".aside-*"))


@pytest.mark.parametrize("size,said", [("0", 0), ("12", 12), ("2KiB", 2048), ("1.5MB", 1_500_000)])
def test_a_bound_is_a_size(size, said, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE_SIZE", size)
    assert shelf.limit() == said


def test_a_bound_that_is_no_size_is_an_error(files, tokenizer, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE_SIZE", "much")
    with pytest.raises(RecipeError, match="'much' is no size"):
        read(data(files), tokenizer)


def test_with_a_bound_of_nothing_nothing_is_kept(files, tokenizer, made, kept, monkeypatch):
    first = read(data(files), tokenizer)
    monkeypatch.setenv("LLMKIT_CACHE_SIZE", "0")
    (kept / "x").mkdir()
    for entry in kept.iterdir():
        assert entry.name == "x" or entry.is_dir()
    other = read(data(files), tokenizer)
    assert len(made) == 4
    same(other, first)
    assert not list(kept.glob(".aside-*"))


def test_what_was_not_used_for_longest_goes_first_and_never_what_is_in_use(files, tokenizer, made, kept, monkeypatch):
    for name in "ab":
        used = read(data(files, name), tokenizer)
        for path in kept.glob("*/manifest.json"):
            os.utime(path, (1, 1))
    one = sum(path.stat().st_size for path in next(kept.glob("*/manifest.json")).parent.iterdir())
    monkeypatch.setenv("LLMKIT_CACHE_SIZE", str(2 * one + one // 2))
    read(data(files, "a", max_length=99), tokenizer)  # the third: one goes, and b is held by `used`
    assert len(list(kept.glob("*/manifest.json"))) == 2
    del made[:]
    read(data(files, "b"), tokenizer)
    assert made == []
    assert used.example(7)[0].tolist()


def test_what_a_dead_maker_left_is_taken_away(files, tokenizer, kept):
    kept.mkdir(mode=0o700)
    (kept / ".aside-dead-1-aa").mkdir()
    (kept / ".aside-dead-1-aa" / "ids").write_bytes(b"x" * 99)
    read(data(files), tokenizer)
    assert not list(kept.glob(".aside-*"))


RIVAL = """
import sys, time
from pathlib import Path
from llmkit.core import shelf
shelf.PATIENCE = float(sys.argv[1])
def make(folder, alive):
    with open(sys.argv[2], "a") as file:
        file.write("made\\n")
    for _ in range(int(sys.argv[3])):
        time.sleep(0.05)
        if sys.argv[4] == "moves":
            alive()
    (folder / "ids").write_bytes(b"12345")
    return {"said": 1}
with shelf.entry("tokens", "k" * 64, make) as held:
    sys.stdout.write(f"{held.facts['said']} {(held.folder / 'ids').read_bytes().decode()}\\n")
"""


def rival(*said):
    return subprocess.Popen([sys.executable, "-c", RIVAL, *map(str, said)], stdout=subprocess.PIPE, text=True)


def answers(*rivals):
    return [one.communicate(timeout=60)[0] for one in rivals]


def test_of_rivals_one_makes_and_the_others_wait(tmp_path):
    log = tmp_path / "log"
    rivals = [rival(0.5, log, 24, "moves") for _ in range(3)]  # longer than the patience of those who wait
    assert answers(*rivals) == ["1 12345\n"] * 3
    assert log.read_text() == "made\n"


def test_a_killed_maker_holds_nobody_up(tmp_path):
    log = tmp_path / "log"
    first = rival(60, log, 2000, "moves")
    while not log.exists():
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert answers(rival(60, log, 0, "moves")) == ["1 12345\n"]
    assert log.read_text() == "made\nmade\n"


def test_a_maker_that_hangs_is_not_waited_for(tmp_path):
    log = tmp_path / "log"
    first = rival(60, log, 2000, "hangs")
    while not log.exists():
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    try:
        assert answers(rival(0.3, log, 0, "moves")) == ["1 12345\n"]
    finally:
        first.kill()
        first.communicate()


def test_a_full_disk_is_the_caches_error(files, tokenizer, kept, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "written", full)
    with pytest.raises(ResourceError, match="LLMKIT_CACHE: writing .*No space left on device; fix: free some space"):
        read(data(files), tokenizer)
    assert not list(kept.glob(".aside-*"))


def test_a_source_whose_disk_fails_is_the_sources_error(files, tokenizer, kept, monkeypatch):
    real = Jsonl.rows

    def failing(self, after=()):
        yield from list(real(self, after))[:3]
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Jsonl, "rows", failing)
    with pytest.raises(DataError, match="/a: cannot be read to its end .Input/output error."):
        read(data(files), tokenizer)
    assert not list(kept.glob(".aside-*"))


def test_all_that_lint_keeps_is_kept(tokenizer):
    fixed = {"tokens", "renderer", "sketches", "told"}
    assert set(vars(Lint(Renderer(tokenizer), 64))) == fixed | set(lint_store.HELD)
