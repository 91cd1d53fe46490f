"""A head that a run of `kind: draft` left drafts in the engine as well as the run's own figures say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.build.llm import LLM
from llmkit.inference.sampling import Sampling
from tests.stages.test_draft_heads import go, head, lines, saved


@pytest.mark.slow
def test_an_engine_makes_as_many_tokens_a_step_as_the_run_says(rows: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", 0)
    made = go(head(model, rows, tmp_path / "run", steps=60))
    foretold = lines(made.folder, "evaluate")[-1]["valid.tokens_per_step"]
    asked = [json.loads(line)["messages"][:1] for line in rows.read_text().splitlines()[:4]]
    how = Sampling(max_tokens=24, ignore_eos=True)
    drafts: dict[str, Any] = {"kind": "head", "path": str(made.folder), "tokens": 3, "fixed": True, "lookup": False}
    with LLM(str(model)) as llm:
        plain = [llm.chat(one, how) for one in asked]
    for width in (1, 3):
        with LLM(str(model), generator={"kind": "engine", "speculation": {**drafts, "width": width}}) as llm:
            assert [llm.chat(one, how) for one in asked] == plain
            stats = llm.engine.stats()
            assert stats.made / (stats.made - stats.accepted) > 0.85 * foretold  # ends are shorter
