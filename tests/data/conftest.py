"""Rows under lint."""

import json

import pytest

from llmkit.data.node import Data, Jsonl
from llmkit.data.prepare import prepare
from llmkit.stages.lint_table import linted
from tests.conftest import make_tokenizer
from tests.data.test_messages import JSON


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return Jsonl(path=str(path))


@pytest.fixture(scope="module")
def tokenizers():
    made = {}

    def get(template=JSON):
        return made.setdefault(template, make_tokenizer(template))

    return get


@pytest.fixture
def lint(tmp_path, tokenizers):
    """Findings of rows, by name."""

    def run(rows, valid=(), template=JSON, **how):
        train = (write(tmp_path / "train.jsonl", rows),)
        beside = (write(tmp_path / "valid.jsonl", valid),) if valid else ()
        data = Data(train=train, valid=beside, **({"max_length": 4096} | how))
        aside = (lambda bad: None) if how.get("on_bad_row") == "quarantine" else None
        made = [prepare(s, data, tokenizers(template), aside=aside) for s in (train, beside) if s]
        found = linted(data, *made) if beside else linted(data, made[0], None)
        return {finding.name: finding for finding in found["data.train"]}

    return run
