"""Whole stages with a method of each group: killed and gone on with, evaluated, asked for text, merged or refused."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from llmkit import Evaluate, Merge
from llmkit.checkpoint import draft
from llmkit.core.errors import ModelError
from llmkit.core.run import Grants
from llmkit.inference.generate import generate
from llmkit.inference.sampling import Sampling
from llmkit.models.node import ModelRef
from llmkit.stages.build_inference import open_model
from tests.stages.test_sft import go, sft
from tests.train.test_resume import finish, in_child, outcome

UNPACKED = {"packing": "none"}
METHODS = {
    "ia3": ({"kind": "ia3"}, {}, ""),
    "vera": ({"kind": "vera", "rank": 8, "dropout": 0.1}, {}, ""),
    "oft": ({"kind": "oft", "block_size": 4, "dropout": 0.2}, {}, ""),
    "boft": ({"kind": "boft"}, {}, ""),
    "prompt_tuning": ({"kind": "prompt_tuning", "virtual_tokens": 4}, UNPACKED, "change what the model reads"),
    "p_tuning": ({"kind": "p_tuning", "virtual_tokens": 4}, UNPACKED, "change what the model reads"),
    "prefix_tuning": ({"kind": "prefix_tuning", "virtual_tokens": 4}, UNPACKED, "adds keys and values"),
    "bottleneck": ({"kind": "bottleneck", "size": 4}, {}, "is not linear"),
}
SLOW = ("vera", "boft", "p_tuning")
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in METHODS]


def node(name, tiny, rows, out):
    adapter, data, _ = METHODS[name]
    source = [{"kind": "jsonl", "path": str(rows)}]
    data = {"train": source, "valid": source, "max_length": 96} | data
    more = {"steps": 4, "checkpoint": {"every": 2}, "evaluate": {"rows": 4, "samples": 1, "max_tokens": 3}}
    return sft(tiny, rows, out, adapter=adapter, data=data, micro_batch=2, **more)


def killed_after_two(made):
    """A run that dies once its second step is saved."""
    own = draft.publish

    def publish(aside, final, disk):
        own(aside, final, disk)
        if final.name == "step-2":
            os.kill(os.getpid(), signal.SIGKILL)

    draft.publish = publish
    return made


@pytest.mark.parametrize("name", EACH)
def test_a_run_is_gone_on_with_bit_for_bit_and_its_result_is_of_use(name, tiny, rows, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    artifact = go(node(name, tiny, rows, whole))
    assert finish(in_child(lambda: killed_after_two(node(name, tiny, rows, cut)))) == -signal.SIGKILL
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == ["step-2"]
    go(node(name, tiny, rows, cut))
    assert outcome(cut) == outcome(whole)

    # the stage's own figure of the model in memory is that of the folder, evaluated alone
    lines = [line for line in outcome(whole)[1] if line["event"] == "evaluate"]
    assert lines[-1]["valid.loss"] != lines[0]["valid.loss"]
    source = [{"kind": "jsonl", "path": str(rows)}]
    task = {"kind": "perplexity", "data": source, "rows": 4, "max_length": 96}
    evaluated = go(Evaluate(model=str(whole), tasks=[task], out=str(tmp_path / "evaluated")))
    (found,) = (r["value"] for r in evaluated.manifest["reports"] if r["metric"].endswith("perplexity"))
    assert found == pytest.approx(lines[-1]["valid.perplexity"], rel=1e-5)
    loaded, _ = open_model(ModelRef(name=str(artifact.model())), "cpu", "auto", Grants())
    made = generate(loaded.model, loaded.tokenizer, [[5, 6, 7], [8, 9]], Sampling(max_tokens=3))
    assert [completion.prompt_tokens for completion in made] == [3, 2]

    merge = Merge(model=str(whole), out=str(tmp_path / "merged"))
    if reason := METHODS[name][2]:
        with pytest.raises(ModelError, match=rf"model: .*cannot be merged: .*{reason}"):
            go(merge)
        assert not (tmp_path / "merged" / "model").exists()
    else:
        assert go(merge).manifest["logit_difference"] <= 1e-5


def test_evas_start_is_of_the_data_and_not_of_neftunes_noise(tiny, rows, tmp_path):
    """A is not trained here, so what is saved is the start."""
    adapter = {"kind": "lora", "rank": 2, "init": "eva", "lora_fa": True}
    starts = []
    for out, noise in (("plain", 0.0), ("noisy", 50.0)):
        made = sft(tiny, rows, tmp_path / out, adapter=adapter, steps=1, neftune=noise)
        starts.append(load_file(go(made).model() / "adapter_model.safetensors"))
    assert all(torch.equal(value, starts[1][key]) for key, value in starts[0].items() if "lora_A" in key)
    assert any(not torch.equal(value, starts[1][key]) for key, value in starts[0].items() if "lora_B" in key)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_averaged_weights_are_saved_where_the_last_form_has_other_shapes(init, tiny, rows, tmp_path):
    source, out = [{"kind": "jsonl", "path": str(rows)}], tmp_path / "run"
    more = {
        "adapter": {"kind": "lora", "rank": 2, "init": init},
        "data": {"train": source, "valid": source, "max_length": 96},
        "optim": {"kind": "schedule_free", "lr": 1e-2},
        "schedule": {"kind": "constant", "warmup": 1},
        "evaluate": {"rows": 4, "samples": 1, "max_tokens": 2},
    }
    go(sft(tiny, rows, out, steps=4, **more))
    lines = [line for line in outcome(out)[1] if line["event"] == "evaluate"]
    assert lines[-1]["valid.loss"] < lines[0]["valid.loss"]
    task = {"kind": "perplexity", "data": source, "rows": 4, "max_length": 96}
    evaluated = go(Evaluate(model=str(out), tasks=[task], out=str(tmp_path / "evaluated")))
    (found,) = (r["value"] for r in evaluated.manifest["reports"] if r["metric"].endswith("perplexity"))
    assert found == pytest.approx(lines[-1]["valid.perplexity"], rel=1e-5)


@pytest.mark.parametrize("name", ["ia3", "oft", "one", pytest.param("boft", marks=pytest.mark.slow)])
def test_over_four_bits_it_is_merged_into_the_base_that_it_saw(name, tiny, rows, tmp_path):
    adapter = {"kind": "lora", "targets": ["q_proj"]} if name == "one" else METHODS[name][0]
    made = sft(tiny, rows, tmp_path / "run", adapter=adapter, steps=2, quant="bnb_nf4", evaluate={"samples": 0})
    go(made)
    facts = go(Merge(model=str(tmp_path / "run"), out=str(tmp_path / "merged"))).manifest
    assert facts["way"] == "into the dequantised base" and facts["logit_difference"] < 1e-3
