"""What the quickstart tells at its end."""

import math
import os
import re
import sys

import pytest

from llmkit.cli import quickstart
from llmkit.core import records
from llmkit.core.metrics import Lines


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A file `bin/llmkit` that this process was called by; PATH leads elsewhere."""
    made = tmp_path / "bin" / "llmkit"
    made.parent.mkdir()
    made.write_text("#!/bin/sh\n")
    made.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(made), "quickstart"])
    monkeypatch.setenv("PATH", os.devnull)
    return made


def test_the_next_commands_name_a_program_that_the_shell_finds(script, tmp_path, monkeypatch):
    said = quickstart._next(tmp_path)
    assert said[0] == f"{script} chat {tmp_path / 'tune'}" and said[2].count(str(script)) == 2
    monkeypatch.setenv("PATH", str(script.parent))
    assert quickstart._next(tmp_path)[0].startswith("llmkit chat ")


def test_called_as_a_module_the_script_beside_the_interpreter_is_named(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llmkit/__main__.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert quickstart._program() == str(script)
    script.unlink()
    assert quickstart._program() == f"{tmp_path / 'bin' / 'python'} -m llmkit"


def test_the_table_keeps_its_columns_apart_and_fills_the_differences(tmp_path, capsys):
    for name, nll in (("before", 40.0), ("after", 20.0)):
        scores = [{"nll": nll + i, "tokens": 2.0, "bytes": 1.0} for i in range(4)]
        rows = [records.Prediction(str(i), str(i), {"task": "p"}, scores=s) for i, s in enumerate(scores)]
        (tmp_path / name).mkdir()
        records.write(tmp_path / name / "predictions.jsonl", rows)
        for metric in ("p.perplexity", "p.bits_per_byte"):
            Lines(tmp_path / name / "evals.jsonl").add({"metric": metric, "value": nll**9, "low": 0.1, "high": nll**9})
    quickstart._tell(tmp_path, 1.0)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("held-out", "p."))]
    assert [len(re.split(r" {2,}", line)) for line in table] == [4, 4, 4]
    assert len({len(line) for line in table}) == 1
    assert float(re.split(r" {2,}", table[2])[3].split()[0]) == pytest.approx(-20 / math.log(2), abs=1e-3)
