"""What tests of faults share: the fault, the recipe, and the same run without a fault."""

import json

import pytest

from llmkit import run
from tests.distributed import QUIET, ended, launched, sft
from tests.distributed.faults import Faults


@pytest.fixture
def faults(tmp_path, record_property):
    return Faults(tmp_path, record_property)


@pytest.fixture(scope="module")
def make(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    said = [("hello world " * (1 + i % 5) + str(i), "the lazy dog " * (1 + i % 3)) for i in range(24)]
    path.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in said))
    source = [{"kind": "jsonl", "path": str(path)}]

    def make(out, **more):
        data = {"train": source, "valid": source, "max_length": 64}
        often = {"evaluate": {"every": 2, "samples": 0, "rows": 4}, "checkpoint": {"every": 1}, "steps": 4}
        return sft(tiny, path, out, **({"data": data} | often | more))

    run(
        make(tmp_path_factory.mktemp("warm") / "run", steps=1), console=QUIET
    )  # ranks are forks: they import nothing then
    return make


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """The control: the same run without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    assert ended(launched(2, lambda rank: run(make(folder / "run"), console=QUIET), folder / "said.txt"), 280.0) == [
        0,
        0,
    ]
    return folder / "run"
