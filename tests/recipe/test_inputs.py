"""What a stage reads and is not there is told by `llmkit check`, by its key, before anything is made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli.recipes import check
from llmkit.core.errors import LlmkitError, ModelError
from llmkit.inference.speculation.node import DraftModel
from llmkit.recipe.inputs import fetched, remote

ROWS = {"data": {"train": [{"kind": "jsonl", "path": "rows.jsonl"}]}}
TASKS = [{"kind": "perplexity", "data": ROWS["data"]["train"]}]
LAST = {"head": {"kind": "head", "path": "gone"}, "draft": {"kind": "draft", "model": "/gone"}}
OWN = {"kind": "own", "generator": {"kind": "engine", "speculation": LAST["head"]}}
CASES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "sft": [(ROWS, "data.train.0.path")],
    "pretrain": [(ROWS, "data.train.0.path")],
    "classify": [(ROWS | {"task": "sequence"}, "data.train.0.path")],
    "evaluate": [
        ({"tasks": TASKS}, "tasks.0.data.0.path"),
        (
            {"tasks": TASKS, "generator": {"kind": "engine", "speculation": LAST["draft"]}},
            "generator.speculation.model",
        ),
    ],
    "merge": [],
    "reward": [(ROWS, "data.train.0.path")],
    "serve": [
        ({"engine": {"speculation": LAST["head"]}}, "engine.speculation.path"),
        ({"engine": {"speculation": LAST["draft"]}}, "engine.speculation.model"),
        ({"engine": {"speculation": {"kind": "ngram", "corpus": "gone"}}}, "engine.speculation.corpus"),
        ({"key_file": "gone"}, "key_file"),
        ({"admin_port": 1, "admin_key_file": "gone"}, "admin_key_file"),
        ({"adapters": {"a": "gone"}}, "adapters.a"),
        ({"adapter_root": "gone"}, "adapter_root"),
    ],
    "draft": [
        (ROWS | {"drafter": {"kind": "ngram"}}, "data.train.0.path"),
        (ROWS | {"drafter": {"kind": "head", "start": "gone"}}, "drafter.start"),
        (ROWS | {"drafter": {"kind": "distilled", "start": "/gone"}}, "drafter.start"),
        (ROWS | {"drafter": {"kind": "head", "answers": OWN}}, "drafter.answers.generator.speculation.path"),
    ],
    "distill": [(ROWS | {"teacher": "/gone"}, "teacher")],
    "constitutional": [
        ({"prompts": ROWS["data"]["train"]}, "prompts.0.path"),
        ({"prompts": ROWS["data"]["train"], "critic": {"model": "/gone"}}, "critic.model"),
    ],
    "preference": [(ROWS | {"reference": {"kind": "model", "path": "/gone"}}, "reference.path")],
}


def told(stage: dict[str, Any]) -> str:
    Path("r.yaml").write_text(json.dumps(stage))
    with pytest.raises(LlmkitError) as caught:
        check("r.yaml", (), 0, False)
    return str(caught.value)


@pytest.mark.parametrize("kind", CASES)
def test_what_is_not_there_is_told_by_its_key(kind: str, tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    first = CASES[kind][0][0] if CASES[kind] else {}
    assert re.search(r"(^|\s)model: /gone", told({"kind": kind, "model": "/gone", "out": "o"} | first))
    for more, key in CASES[kind]:
        said = told({"kind": kind, "model": str(tiny), "out": "o"} | more)
        assert re.search(rf"(^|\s){key}(\.name)?: \S*(gone|rows\.jsonl)", said), (key, said)


def test_a_model_that_is_not_there_is_a_models_fault_whatever_its_key(
    tiny: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for kind, more in (("distill", ROWS | {"teacher": "/gone"}), ("serve", {"engine": {"speculation": LAST["draft"]}})):
        Path("r.yaml").write_text(json.dumps({"kind": kind, "model": str(tiny), "out": "o"} | more))
        with pytest.raises(ModelError, match="/gone is not there"):
            check("r.yaml", (), 0, False)
    for name in ("./nope", "../nope", "nope"):
        Path("r.yaml").write_text(json.dumps({"kind": "merge", "model": name, "out": "o"}))
        with pytest.raises(ModelError, match=f"model: {re.escape(name)} is not there"):
            check("r.yaml", (), 0, False)


def test_all_that_a_pipeline_lacks_is_told_at_once_by_its_stage(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    first = {"kind": "sft", "model": str(tiny)} | ROWS
    last = {"kind": "evaluate", "model": "${stages.one}", "tasks": TASKS}
    said = told({"out": "work", "stages": [{"name": "one"} | first, {"name": "two"} | last]})
    keys = re.findall(r"(\S+): rows\.jsonl is not there", said)
    assert keys == ["stages.one.data.train.0.path", "stages.two.tasks.0.data.0.path"], said


def test_what_earlier_stages_leave_is_not_the_hubs() -> None:
    node = DraftModel(model="work/small")
    assert remote(node) and remote(node, ["other"])  # the control
    assert not remote(node, ["work"]) and not remote((node,), ["work/small"])
    assert fetched("org/name") and not fetched("./name") and not fetched("work/x", ["work"])
