"""Lint in whole runs and checks: the table in the terminal, in the run's folder and in the report."""

import json
from dataclasses import replace

import pytest

from llmkit.core.errors import DataError
from llmkit.core.run import Grants
from llmkit.models.node import ModelRef
from llmkit.stages import lint_table
from tests.cli.conftest import call
from tests.data import clean
from tests.stages.test_sft import go, sft

__all__ = ["call"]
SPOILT = [
    *clean.rows("completion", 24),
    clean.rows("completion", 30)[29] | {"completion": " nan"},
    clean.rows("completion", 24)[3],
]


def written(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def node(tiny, tmp_path, **data):
    made = sft(tiny, "unused", tmp_path / "run", steps=1)
    files = [{"kind": "jsonl", "path": str(written(tmp_path / "rows.jsonl", SPOILT))}]
    held = {"train": files, "max_length": 512, **data}
    return sft(tiny, "unused", made.out, data=held, steps=1, batch={"rows": 2}, evaluate={})


def test_a_run_keeps_the_table_and_its_report_shows_it_and_what_was_left_out_is_in_the_manifest(tiny, tmp_path):
    artifact = go(node(tiny, tmp_path, dedup="exact"))
    said = json.loads((artifact.folder / "lint.json").read_text())
    found = {f["name"]: f for f in said["findings"]["data.train"]}
    assert found["placeholder"]["places"][0]["line"] == 25 and found["removed copy"]["count"] == 1
    assert said["shares"]["completion"] > 0.3 and 0 < said["shares"]["trained"] < 1
    page = (artifact.folder / "report.html").read_text()
    assert "<h2>Lint</h2>" in page and "rows.jsonl:25" in page and "Share of tokens" in page
    assert artifact.manifest["counts"]["left out: removed copy"] == 1
    assert artifact.manifest["counts"]["examples"] == len(SPOILT) - 1


@pytest.mark.parametrize("code", [False, True])
def test_the_models_own_template_is_read_with_the_grant_that_the_run_has(code, tiny, tmp_path, monkeypatch):
    real, asked = lint_table.read_tokenizer, []
    monkeypatch.setattr(lint_table, "read_tokenizer", lambda r, ref, code: asked.append(code) or real(r, ref, code))
    go(replace(node(tiny, tmp_path), model=ModelRef(name=str(tiny), template="chatml")), grants=Grants(code=code))
    assert asked == [code]


def test_as_an_error_it_stops_a_run_before_its_model_is_loaded(tiny, tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl:\d+: data\.train: lint finds .*placeholder 1"):
        go(node(tiny, tmp_path, lint="error"))
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "model").exists()


def test_check_prints_the_table(tiny, tmp_path, call):
    rows = written(tmp_path / "rows.jsonl", SPOILT)
    recipe = tmp_path / "r.yaml"
    text = f"kind: sft\nmodel: {tiny}\nbatch: {{rows: 2}}\nout: run\n"
    text += f"data:\n  train: [{{kind: jsonl, path: {rows}}}]\n  max_length: 512\n  LINT\n"
    recipe.write_text(text.replace("LINT", "dedup: minhash"))
    code, out, err = call("check", recipe)
    assert code == 0 and not err and "data.train: lint: warnings 1, notes 1" in out
    assert f"an answer that is none: {rows}:25 ('nan')" in out and "warn  placeholder" in out
    assert "left out: removed copy 1" in out and "tokens by role, about: completion" in out
    recipe.write_text(text.replace("LINT", "lint: error"))
    code, out, err = call("check", recipe)
    assert code == 3 and err.count("\n") == 1 and "data.lint.allow" in err and not (tmp_path / "run").exists()
    recipe.write_text(text.replace("LINT", "lint: {allow: [nothing]}"))
    code, out, err = call("check", recipe)
    assert code == 2 and "data.lint.allow: no finding is called nothing; fix: use broken, " in err
