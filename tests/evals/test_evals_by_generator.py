"""An evaluation says the same whichever generator writes: its texts, its figures and their intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit import Evaluate, run
from llmkit.data.node import Jsonl
from llmkit.evals.tasks import Generation, MultipleChoice, Perplexity
from llmkit.inference.node import OwnEngine, Transformers
from llmkit.models.node import ModelRef

NAMES = ["rain", "a bridge", "seven", "an old map", "sound", "bread", "tides", "a queue", "iron", "a song"]
FORMS = ["What is {}?", "Write one sentence about {}.", "Name three words for {}.", "{} or not {}?"]


def lay(folder: Path, count: int) -> tuple[Jsonl, Jsonl]:
    """Questions, and choices."""
    asked = [form.format(name, name) for form in FORMS for name in NAMES][:count]
    rows = [{"prompt": text, "completion": f"It is {NAMES[i % 7]}, and no more."} for i, text in enumerate(asked)]
    choices = [
        {"prompt": text, "choices": [" yes", " no", f" {NAMES[i % 5]}"], "label": i % 3} for i, text in enumerate(asked)
    ]
    for name, held in (("rows", rows), ("choices", choices)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return Jsonl(path=str(folder / "rows.jsonl")), Jsonl(path=str(folder / "choices.jsonl"))


def evaluated(folder: Path, model: str, generator: Any, count: int, most: int) -> tuple[list[Any], list[Any]]:
    """What was predicted, and the figures."""
    rows, choices = lay(folder, count)
    tasks = (Generation(data=(rows,), max_tokens=most), Perplexity(data=(rows,)), MultipleChoice(data=(choices,)))
    out = folder / generator.kind
    run(Evaluate(model=ModelRef(name=model), tasks=tasks, generator=generator, out=str(out)))
    told = [[json.loads(line) for line in (out / name).read_text().splitlines()] for name in FILES]
    return told[0], told[1]


FILES = ("predictions.jsonl", "evals.jsonl")
OWN = ("run_id", "seconds", "model_version")


def agree(folder: Path, model: str, count: int, most: int) -> None:
    (ours, figures), (theirs, others) = (
        evaluated(folder, model, generator, count, most) for generator in (OwnEngine(), Transformers(batch=1))
    )
    texts = [(a["prediction"], b["prediction"]) for a, b in zip(ours, theirs, strict=True)]
    assert [a for a, _ in texts] == [b for _, b in texts] and any(a for a, _ in texts)
    assert len(figures) == len(others) >= 4
    for a, b in zip([*ours, *figures], [*theirs, *others], strict=True):
        for key in a.keys() - set(OWN):
            assert a[key] == pytest.approx(b[key], rel=1e-6) if isinstance(a[key], float) else a[key] == b[key], key


def test_the_engine_and_transformers_evaluate_alike(tiny: Path, tmp_path: Path) -> None:
    agree(tmp_path, str(tiny), 6, 8)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_they_do_so_on_a_real_model(tmp_path: Path) -> None:
    agree(tmp_path, "smollm2-135m-instruct-q4", 40, 48)
