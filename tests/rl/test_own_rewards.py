"""Functions of the user's own as rewards: they run where that was allowed, in a process that may come to any end."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from rated import sample

from llmkit.core.errors import DataError, RecipeError
from llmkit.core.run import Grants
from llmkit.rl.bench import Bench
from llmkit.rl.rewards_node import Python
from llmkit.rl.scoring import score


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def own(tmp_path):
    """A function of one's own, as a reward, and a bench where it may run."""
    with Bench(Grants(python=True)) as bench:

        def scored(text, samples, file="my.py", **more):
            (tmp_path / file).write_text(text)
            return score([Python(ref=f"{tmp_path}/{file}:score", **more)], samples, bench)

        yield scored


PLAIN = "def score(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
TWO = [sample("ab", "x"), sample("abc", "y", line=2, prompt="and this?")]


def test_a_function_gets_columns_by_name_and_only_those_that_it_takes(own):
    text = "def score(prompts, completions, answer, completion_ids, missing='d'):\n"
    text += "    assert missing == 'd' and prompts == ['how many?', 'and this?'] and answer == ['x', 'y']\n"
    text += "    return [len(c) + len(i) for c, i in zip(completions, completion_ids)]\n"
    samples = [sample("ab", "x", token_ids=(1, 2)), sample("abc", "y", prompt="and this?", token_ids=(1,))]
    assert own(text, samples).total == (4, 4)


def test_messages_come_as_messages(own):
    text = "def score(prompts, completions):\n"
    text += "    return [len(p) * 10 + len(c[-1]['content']) for p, c in zip(prompts, completions)]\n"
    asked = ({"role": "user", "content": "hi"},)
    said = [sample("abc", prompt=asked), sample("ab", prompt=asked, turns=({"role": "tool", "content": "four"},))]
    said.append(sample("ab", prompt="hi", turns=({"role": "tool", "content": "four"},)))  # tools make it a conversation
    assert own(text, said).total == (13, 14, 24)


def test_nothing_runs_that_was_not_allowed_and_what_was_is_remembered_by_its_digest(tmp_path):
    file, mark = tmp_path / "my.py", tmp_path / "ran"
    file.write_text(f"open({str(mark)!r}, 'w')\n{PLAIN}")
    node = Python(ref=f"{file}:score")
    with (
        Bench() as bench,
        pytest.raises(RecipeError, match=r"reward.ref: .*my.py:score runs code of yours .*--allow-python"),
    ):
        score([node], TWO, bench)
    assert not mark.exists()
    with Bench(Grants(python=True)) as bench:
        assert score([node], TWO, bench).total == (2, 3)
    assert mark.exists()
    with Bench() as bench:  # remembered
        assert score([node], TWO, bench).total == (2, 3)
    file.write_text(file.read_text() + "# another\n")
    with Bench() as bench, pytest.raises(RecipeError, match="nobody allowed"):
        score([node], TWO, bench)


def test_what_is_no_function_is_told_before_anything_runs(tmp_path):
    def refused(ref, match):
        with Bench(Grants(python=True)) as bench, pytest.raises(RecipeError, match=match):
            score([Python(ref=ref)], TWO, bench)

    (tmp_path / "my.py").write_text("raise SystemExit(3)\ndef score(): ...\n")
    refused(f"{tmp_path}/none.py:score", "cannot be read")
    refused(f"{tmp_path}/my.py:other", "has no other; fix: name one of score")
    refused(f"{tmp_path}/my.py:score", r"it fails as it is read: SystemExit: 3 \(.*my.py:1\)")
    (tmp_path / "my.py").write_text("def score(:\n")
    refused(f"{tmp_path}/my.py:score", "is no Python")
    with pytest.raises(RecipeError, match="'my.py' names no function of a file; fix: write FILE.py:FUNCTION"):
        Python(ref="my.py")


def test_what_a_function_prints_or_reads_is_on_no_channel_of_ours(own):
    text = "import os, sys\ndef score(completions):\n    print('{\"scores\": [9, 9]}', flush=True)\n"
    text += "    os.write(1, b'more\\n')\n    os.system('echo even more')\n    assert sys.stdin.read() == ''\n"
    text += "    return [1, 2]\n"
    assert own(text, TWO).total == (1, 2)


@pytest.mark.parametrize(
    "body, why",
    [
        (
            "raise KeyError('no')",
            r"rows.jsonl:1: reward \(python\): answer 0 \(to 'how many\?'\) and 1 more: KeyError: 'no' \(.*my.py:2\)",
        ),
        ("return [1]", "score gave 1 scores for 2 completions; fix: return a list of one number for each"),
        ("return 3", "score gave int, no list of numbers"),
        ("return ['1', 2]", "score gave '1' for completion 0, no number"),
        ("return [1, None]", "score gave None for completion 1, no number"),
        ("return [1, 10**5000]", "score gave too large a number for completion 1; fix: return a list of one number"),
        ("return [1, {}]", "score gave dict for completion 1, no number"),
        ("return [1, float('nan')]", "rows.jsonl:2: .*answer 1 .*: has the score nan"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(7)", r"answer 0 .*: ended its process \(status 7\)"),
        ("import os; os.kill(os.getpid(), 9)", r"ended its process \(signal SIGKILL\)"),
    ],
)
def test_a_broken_function_is_an_error(own, body, why):
    with pytest.raises(DataError, match=why):
        own(f"def score(completions):\n    {body}\n", TWO)


def test_of_many_answers_the_one_is_named_that_the_function_fails_of(own):
    text = "import time\ndef score(completions):\n    if any(len(c) == 3 for c in completions):\n        {}\n"
    text += "    return [1.0] * len(completions)\n"
    for fails, why in (
        ("1 / 0", "ZeroDivisionError"),
        ("time.sleep(60)", "took more than 1 s"),
        ("exit()", "SystemExit"),
    ):
        began = time.monotonic()
        with pytest.raises(DataError, match=f"rows.jsonl:2: .*answer 1 \\(to 'and this\\?'\\): {why}"):
            own(text.format(fails), TWO, f"{why[:4]}.py", timeout=1.0)
        found = own(text.format(fails), TWO, f"{why[:4]}.py", timeout=1.0, failed=-1.0)
        assert found.total == (1, -1) and found.failed == {"python": 1}
        assert time.monotonic() - began < 30


def test_a_function_that_fails_of_several_together_is_not_pinned_on_one(own):
    text = "def score(completions):\n    assert len(completions) == 1\n    return [1.0]\n"
    with pytest.raises(DataError, match="AssertionError.* with 2 samples and with none of them alone"):
        own(text, TWO)


def test_the_others_are_scored_together_again_where_one_fails(own):
    """A function may compare answers: what it says of one alone is no score of it among the others."""
    three = [sample("a", "1"), sample("bb", "2"), sample("ccc", "3")]
    text = "def score(completions):\n    if 'bb' in completions:\n        raise ValueError('bb')\n"
    ranks = "    return [float(sorted(completions).index(c) + 10 * len(completions)) for c in completions]\n"
    found = own(text + ranks, three, failed=-1.0)
    assert found.total == (20, -1, 21)
    crowded = "    if len(completions) == 2:\n        raise ValueError('two')\n"
    with pytest.raises(DataError, match="answer 0 .*two.*also without the 1 of 3 samples"):
        own(text + crowded + ranks, three, "crowded.py", failed=-1.0)


def test_a_function_that_wants_a_column_that_is_not_there(own):
    with pytest.raises(DataError, match="score asks for solution, which the rows have no column of"):
        own("def score(completions, solution): ...\n", TWO, failed=0.0)


def test_a_function_may_import_from_its_own_folder_and_keep_what_it_made(own, tmp_path):
    (tmp_path / "beside.py").write_text("step = 10\n")
    text = "import beside\nseen = []\ndef score(completions):\n    seen.extend(completions)\n"
    text += "    return [len(seen) + beside.step] * len(completions)\n"
    assert own(text, TWO).total == (12, 12)
    assert own(text, TWO).total == (14, 14)


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    (tmp_path / "my.py").write_text(
        "import os, time\ndef score(completions):\n    open('pid', 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    )
    code = (
        "from llmkit.core.run import Grants\nfrom llmkit.rl.bench import Bench\nfrom llmkit.rl.sample import Sample\n"
    )
    code += "from llmkit.rl.rewards_node import Python\nfrom llmkit.rl.scoring import score\n"
    code += "score([Python(ref='my.py:score', timeout=500)], [Sample('a', 'b')], Bench(Grants(python=True)))\n"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    pid, until = tmp_path / "pid", time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    assert running(int(pid.read_text()))
    child.kill()
    child.wait()
    while running(int(pid.read_text())) and time.monotonic() < until:
        time.sleep(0.02)
    assert not running(int(pid.read_text()))


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_one_fault_of_a_whole_call_is_told_once(own):
    with pytest.raises(DataError) as caught:
        own("def score(completions):\n    raise ValueError('no')\n", TWO)
    (problem,) = caught.value.problems
    assert problem.line == 1 and "answer 0 (to 'how many?') and 1 more: ValueError: no" in problem.what
