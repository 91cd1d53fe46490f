"""What `check` and the beginning of a run tell of a recipe, before any model is read."""

import errno
import json
from pathlib import Path

import pytest

from llmkit.core.errors import RecipeError
from llmkit.core.files import amount_of, refused
from llmkit.inference.request import RequestError, asked_by

RECIPE = """kind: policy
model: {model}
data:
  train: [{{kind: jsonl, path: rows.jsonl}}]
  max_length: 48
reward:
- {reward}
rollout: {{group: 2, max_tokens: 6}}
batch: {{prompts: 2}}
steps: 1
out: {out}
"""
ROWS = [{"prompt": f"question {at} of the model", "answer": "a"} for at in range(3)]


@pytest.fixture
def told(call, tiny, tmp_path, monkeypatch):
    """What is said of a policy with a reward, by a verb that has to fail: (exit status, the line)."""
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))

    def said(reward, *words, verb="check", status=None, rows=ROWS):
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path("r.yaml").write_text(RECIPE.format(model=tiny, reward=reward, out="out"))
        code, _, line = call(verb, "r.yaml", *words)
        assert not Path("out", "status.json").exists()
        assert status is None or (code == status and line.count("llmkit: error: ") == 1), line
        return line

    return said


@pytest.fixture
def no_model(monkeypatch):
    """No model may be read."""
    from llmkit.stages import build_training

    def read(*_):
        raise AssertionError("the model was read")

    monkeypatch.setattr(build_training, "_built", read)


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize(
    ("one", "key"), [("{kind: exact, column: other}", "reward"), ("[{kind: exact, column: other}]", "reward.0")]
)
def test_a_reward_of_best_of_that_is_written_without_a_list_has_no_number(call, tiny, verb, one, key):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = "[{kind: jsonl, path: rows.jsonl}]"
    Path("r.yaml").write_text(f"kind: best_of\nmodel: {tiny}\ndata: {data}\nreward: {one}\nout: out\n")
    code, _, line = call(verb, "r.yaml")
    assert code == 3 and f"rows.jsonl:1: {key}.column: its row has no column other" in line
    Path("r.yaml").write_text(
        Path("r.yaml").read_text().replace("kind: exact, column: other", "kind: model, path: ./none")
    )
    code, _, line = call(verb, "r.yaml")
    assert code == 4 and "r.yaml:4:" in line and f" {key}.path: " in line


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_column_that_a_reward_reads_and_no_row_has(told, no_model, verb):
    line = told("{kind: exact, column: answr}", verb=verb, status=3)
    assert "rows.jsonl:1: reward.0.column: its row has no column answr; fix: give rows with it, or name another" in line
    assert "(columns: answer)" in line
    bare = [{"prompt": "a question of the model"}] * 2
    line = told("{kind: exact}", verb=verb, status=3, rows=bare)
    assert line.rstrip().endswith("fix: give rows with it")
    line = told("{kind: exact}", verb=verb, status=3, rows=[*ROWS, {"prompt": "more", "answer": None}])
    assert "rows.jsonl:4: reward.0.column: column answer is empty" in line
    line = told("{kind: judge, model: {name: x, attention: eager}, against: best}", status=4)
    assert "x is no alias, no Hub id and no folder" in line or "x is not there" in line


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_function_of_ones_own_that_nobody_allowed_or_that_asks_for_more(told, no_model, verb):
    own = "def score(completions, *, answer, solution, bonus=1):\n    return [1.0] * len(completions)\n"
    Path("my.py").write_text(own)
    reward = "{kind: python, ref: ./my.py:score}"
    line = told(reward, verb=verb, status=2)
    assert "r.yaml:7:" in line and "reward.0.ref: ./my.py:score runs code of yours" in line
    assert "nobody allowed yet; fix: read it, then run once with --allow-python" in line
    line = told(reward, "--allow-python", verb=verb, status=3)
    assert "reward.0.ref: score asks for solution, which the rows have no column of; fix: give it a default" in line


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize("value", ["5", "[print]", "None"])
def test_a_name_of_the_users_own_that_is_nothing_to_call(told, no_model, verb, value):
    Path("my.py").write_text(f"def score(completions): ...\n\n\nscore: object = {value}\n")
    line = told("{kind: python, ref: ./my.py:score}", "--allow-python", verb=verb, status=2)
    assert "r.yaml:7:" in line and "reward.0.ref: ./my.py: score is no function; fix: name a function" in line


def test_a_check_allows_nothing(told):
    Path("my.py").write_text("def score(completions):\n    return [1.0] * len(completions)\n")
    assert "error" not in told("{kind: python, ref: ./my.py:score}", "--allow-python")
    told("{kind: python, ref: ./my.py:score}", status=2)


def test_a_reward_model_that_is_not_there(told):
    assert "r.yaml:7:" in (line := told("{kind: model, path: ./none}", status=4)) and "reward.0.path: ./none" in line
    Path("empty").mkdir()
    assert "reward.0.path: empty has no config.json" in told("{kind: model, path: empty}", status=4)


@pytest.mark.parametrize("verb", ["check", "run"])
def test_rewards_that_cannot_say_what_answers_are_worth(told, no_model, verb, tiny):
    line = told(f"{{kind: model, path: {tiny}}}", verb=verb, status=4)
    assert "r.yaml:7:" in line and f"reward.0.path: {tiny} is a language model; fix: give what kind: reward" in line
    line = told("{kind: json_schema, schema: '{'}", verb=verb, status=2)
    assert "r.yaml:7:" in line and "reward.0.schema: is no JSON schema" in line
    Path("s.json").write_text('{"type": "nope"}')
    assert "reward.0.path: is no JSON schema ('nope'" in told("{kind: json_schema, path: s.json}", verb=verb, status=2)
    there = json.loads((Path(tiny) / "config.json").read_text())["max_position_embeddings"]
    judge = f"{{kind: judge, model: {tiny}, sampling: {{max_tokens: {there}}}}}"
    line = told(judge, verb=verb, status=2)
    assert f"reward.0.sampling.max_tokens: {there} tokens behind a prompt are past the {there} positions" in line


def test_settings_that_make_no_sense(told):
    assert "reward: all weights are 0" in told("{kind: exact, weight: 0}", status=2)
    assert "loss.clip: 2 is out of range" in told("{kind: exact}", "loss=grpo", "loss.clip=2", status=2)
    assert "rollout.group: 99999999999999999999 is out of range" in told(
        "{kind: exact}", "rollout.group=99999999999999999999", status=2
    )


@pytest.mark.parametrize("verb", ["check", "run"])
def test_constitutional_answers_past_the_positions_are_told_first(call, tiny, verb):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    text = f"kind: constitutional\nmodel: {tiny}\nprompts: [{{kind: jsonl, path: rows.jsonl}}]\nout: out\n"
    Path("r.yaml").write_text(text)
    drawn = "sampling.temperature=1.0"
    code, _, line = call(verb, "r.yaml", drawn, "sampling.max_tokens=100000")
    assert code == 2 and "sampling.max_tokens: 100000 tokens behind a prompt are past the" in line
    judge = f"judge={{model: {tiny}, sampling: {{max_tokens: 99999}}}}"
    code, _, line = call(verb, "r.yaml", drawn, "sampling.max_tokens=8", judge)
    assert code == 2 and " judge.sampling.max_tokens: 99999 tokens behind a prompt" in line


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_model_with_too_few_positions_for_prompt_and_answer(told, no_model, verb, tiny):
    there = json.loads((Path(tiny) / "config.json").read_text())["max_position_embeddings"]
    more = (f"data.max_length={2 * there}", f"rollout.max_tokens={there}")
    line = told("{kind: regex, pattern: a}", *more, verb=verb, status=2)
    assert f"rollout.max_tokens: {there} tokens behind the " in line and f"are past the {there} positions" in line
    assert line.rstrip().endswith(f"fix: set data.max_length={there}") and "rows.jsonl:" in line


@pytest.mark.parametrize("verb", ["check", "run"])
def test_an_error_in_a_pipeline_names_its_stage_and_its_line(call, tiny, tmp_path, verb):
    body = RECIPE.format(model=tiny, reward="{kind: exact, column: answr}", out="").replace("out: \n", "")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    indented = body.replace("\n", "\n  ").rstrip()
    Path("p.yaml").write_text(f"out: whole\nstages:\n- name: sums\n  {indented}\n")
    code, _, line = call(verb, "p.yaml")
    assert code == 3 and "rows.jsonl:1: stages.sums.reward.0.column: its row has no column answr" in line
    code, _, line = call(verb, "p.yaml", "stages.sums.reward.0.column=answer", "stages.sums.batch.prompts=9")
    assert code == 3 and "p.yaml:7:" in line and "stages.sums.data.train: " in line


@pytest.mark.parametrize("verb", ["check", "run"])
def test_prompts_that_fill_no_step_and_lists_of_no_source(told, no_model, verb):
    line = told("{kind: format}", "batch.prompts=10", verb=verb, status=3)
    assert "3 examples do not fill one step of 10; fix: set batch.prompts=3" in line
    assert "data.train: holds no rows" in told("{kind: format}", "data.train=[]", verb=verb, status=3)


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_file_of_a_reward_that_is_not_there_is_the_recipes_fault(told, no_model, verb):
    assert "reward.0.ref: gone.py " in told('{kind: python, ref: "gone.py:x"}', verb=verb, status=2)
    assert "reward.0.path: gone.json " in told("{kind: json_schema, path: gone.json}", verb=verb, status=2)


def test_requests_are_told_by_the_keys_of_the_recipe():
    for said, key in (("max_tokens", "rollout.max_tokens"), ("prompt", "data.max_length"), ("", "rollout")):
        with pytest.raises(RequestError) as caught, asked_by("rollout", {"prompt": "data.max_length"}):
            raise RequestError("is past the 8 that there are", fix="give 2", key=said)
        assert str(caught.value) == f"{key}: is past the 8 that there are; fix: give 2"


def test_a_limit_on_the_size_of_files_is_no_full_disk():
    said = str(refused(OSError(errno.EFBIG, ""), "saving", Path("x"), 70_000))
    assert (
        said == "out: saving x, which needs 68 KiB, failed: File too large; fix: raise the limit on the size of a "
        "file (ulimit -f)"
    )
    assert [amount_of(size) for size in (3, 2048, 5 << 20)] == ["3 B", "2 KiB", "5 MiB"]


def test_a_whole_batch_may_be_replaced_and_steps_have_an_end(tiny, tmp_path, monkeypatch):
    from llmkit.recipe.load import load_recipe

    monkeypatch.chdir(tmp_path)
    Path("b.yaml").write_text(
        f"kind: sft\nmodel: {tiny}\ndata: {{train: [{{kind: jsonl, path: x}}]}}\nbatch: {{rows: 4}}\nout: o\n"
    )
    batch = load_recipe("b.yaml", ["batch={tokens: 64}"]).stages[0][1].batch
    assert (batch.tokens, batch.rows) == (64, type(batch).rows)
    Path("c.yaml").write_text("extends: b.yaml\nbatch: {tokens: 32}\n")
    assert load_recipe("c.yaml").stages[0][1].batch.tokens == 32
    with pytest.raises(RecipeError, match="steps: 99999999999 is out of range; fix: give a value at most"):
        load_recipe("b.yaml", ["steps=99999999999"])
    with pytest.raises(RecipeError, match="seed: 99999999999999999999 is out of range; fix: give a value at most"):
        load_recipe("b.yaml", ["seed=99999999999999999999"])


OWN = """kind: {kind}
model: {model}
data:
  train: [{{kind: jsonl, path: rows.jsonl}}]
  max_length: 48
reward: [{{kind: length, shape: {{kind: at_most, length: 4}}}}]
rollout: {{group: 2, max_tokens: 6, environment: {{kind: python, ref: ./my.py:Own}}}}
loss: {{kind: python, ref: ./my.py:{loss}}}
batch: {{prompts: 2}}
steps: 1
out: out
"""


def test_code_that_would_run_here_is_told_and_not_run_by_a_check(call, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("my.py").write_text("open('ran', 'w')\nclass Own: ...\ndef loss(drawn): ...\n")
    Path("r.yaml").write_text(OWN.format(kind="policy", model=tiny, loss="loss"))
    for verb in ("check", "run"):
        code, _, line = call(verb, "r.yaml")
        assert code == 2 and line.count("llmkit: error: ") == 1
        assert "r.yaml:" in line and ".ref: ./my.py:" in line and "runs code of yours (sha256" in line
    assert "error" not in call("check", "r.yaml", "--allow-python")[2] and not Path("ran").exists()
    Path("r.yaml").write_text(OWN.format(kind="policy", model=tiny, loss="none"))
    assert "r.yaml:8:" in (line := call("check", "r.yaml", "--allow-python")[2])
    assert "loss.ref: ./my.py has no none; fix: name one of Own, loss" in line and not Path("ran").exists()


@pytest.mark.parametrize("verb", ["check", "run", "plan"])
def test_a_model_that_is_not_there_is_named_by_what_names_it(told, no_model, call, verb):
    for reward, key in (("{kind: model, path: ./no}", "path"), ("{kind: judge, model: ./no}", "model")):
        line = told(reward, verb=verb, status=4)
        assert "r.yaml:7:" in line and f"reward.0.{key}: ./no is no" in line
    line = told("{kind: format}", "reference.kind=model", "reference.path=./no", "loss.beta=0.1", verb=verb, status=4)
    assert "reference.path: ./no is no" in line
    Path("rows.jsonl").write_text("".join(json.dumps({**row, "completion": "a"}) + "\n" for row in ROWS))
    kept = Path("r.yaml").read_text().partition("reward:")[0].replace("kind: policy", "kind: distill")
    Path("r.yaml").write_text(f"{kept}teacher: ./no\nsteps: 1\nout: out\n")
    code, _, line = call(verb, "r.yaml", "data.max_length=200", "batch.rows=2")
    assert code == 4 and "teacher: ./no is no" in line, line
