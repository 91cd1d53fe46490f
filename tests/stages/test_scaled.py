"""RoPE scaling through whole stages: trained, remembered, evaluated, merged, and read by transformers alone."""

from __future__ import annotations

import json

import pytest
import torch

from llmkit import Evaluate, Merge, Sft, run
from llmkit.core.console import Console
from llmkit.core.errors import ModelError
from llmkit.core.run import Grants
from llmkit.models.node import ModelRef
from llmkit.models.positions import check_length
from llmkit.models.resolve import resolve
from llmkit.stages.build_inference import open_model

YARN = {"kind": "yarn", "factor": 4.0}
LONG = {"kind": "longrope", "factor": 4.0, "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 32}
ROPES = {"yarn": YARN, "longrope": LONG, "dynamic": {"kind": "dynamic", "factor": 4.0}}


class Told(Console):
    def __init__(self):
        super().__init__(quiet=True)
        self.said = []

    def notice(self, text):
        self.said.append(text)


def sft(model, rows, out, rope, **more):
    data = {"train": [{"kind": "jsonl", "path": str(rows)}], "max_length": 96}
    options = {"adapter": {"kind": "lora", "rank": 4}, "batch": {"rows": 5}, "steps": 2, **more}
    return Sft(model={"name": str(model), "rope": rope}, data=data, out=str(out), **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 63)[None], use_cache=False).logits


@pytest.mark.parametrize("kind", ROPES)
def test_an_adapter_s_run_remembers_its_scaling(kind, tiny, rows, tmp_path):
    from transformers import AutoModelForCausalLM

    artifact = run(sft(tiny, rows, tmp_path / "run", ROPES[kind]), console=Told())
    assert json.loads((artifact.model() / "llmkit.json").read_text())["rope"]["kind"] == kind
    loaded = open_model(ModelRef(name=str(artifact.folder)), "cpu", "fp32", Grants())[0]
    said = loaded.model.config.rope_parameters
    assert (said["rope_type"], said["factor"]) == (kind, 4.0)
    assert loaded.support.packed
    merged = run(Merge(model=str(artifact.folder), out=str(tmp_path / "merged")), console=Told())
    plain = AutoModelForCausalLM.from_pretrained(merged.model())  # without llmkit
    assert plain.config.rope_parameters == said
    length = 512 if kind == "dynamic" else 128 if kind == "longrope" else 2048
    assert plain.config.max_position_embeddings == length
    assert torch.allclose(logits(plain), logits(loaded.model), atol=2e-6)
    unscaled = open_model(ModelRef(name=str(tiny)), "cpu", "fp32", Grants())[0]
    assert unscaled.model.config.rope_parameters["rope_type"] == "default"
    reached = 2048 if kind == "dynamic" else length
    found = resolve(ModelRef(name=str(artifact.folder)))
    assert check_length(found, reached, "key") == ""
    assert f"{reached + 1} is more than the {reached} positions" in check_length(found, reached + 1, "key")
    if kind == "yarn":
        assert loaded.tokenizer.model_max_length >= 2048


def test_every_weight_trained_leaves_a_scaled_model(tiny, rows, tmp_path):
    from transformers import AutoModelForCausalLM

    artifact = run(sft(tiny, rows, tmp_path / "run", YARN, adapter="none"), console=Told())
    said = json.loads((artifact.model() / "config.json").read_text())
    assert said["rope_parameters"]["rope_type"] == "yarn" and said["max_position_embeddings"] == 2048
    ours = open_model(ModelRef(name=str(artifact.folder)), "cpu", "fp32", Grants())[0]
    plain = AutoModelForCausalLM.from_pretrained(artifact.model())
    assert torch.allclose(logits(plain), logits(ours.model), atol=2e-6)
    plain.config.rope_parameters = {"rope_type": "default", "rope_theta": said["rope_parameters"]["rope_theta"]}
    control = AutoModelForCausalLM.from_pretrained(artifact.model(), config=plain.config)
    assert not torch.allclose(logits(control), logits(ours.model), atol=1e-4)


def test_an_evaluation_says_a_scaling_and_takes_an_adapter_s(tiny, rows, tmp_path):
    task = {"kind": "perplexity", "data": [{"kind": "jsonl", "path": str(rows)}], "max_length": 96}
    values = {}
    for name, rope in (("plain", None), ("scaled", {"kind": "linear", "factor": 8.0})):
        node = Evaluate(model={"name": str(tiny), "rope": rope}, tasks=[task], out=str(tmp_path / name))
        values[name] = run(node, console=Told()).manifest["reports"][0]["value"]
    assert values["plain"] != values["scaled"]


def test_what_cannot_be_scaled_is_refused_before_anything_is_made(tiny, rows, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.conftest import make_tokenizer

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=448)).save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"^model\.rope: gpt2 has no RoPE"):
        run(sft(tmp_path / "gpt2", rows, tmp_path / "a", YARN), console=Told())
    whole = run(sft(tiny, rows, tmp_path / "run", YARN, adapter="none"), console=Told())
    with pytest.raises(ModelError, match=r"^model\.rope\.kind: llama has RoPE `yarn` of its own"):
        run(sft(whole.folder, rows, tmp_path / "b", YARN), console=Told())
    again = {**YARN, "factor": 8.0, "replace": True}
    said = run(sft(whole.folder, rows, tmp_path / "c", again, adapter="none"), console=Told()).model() / "config.json"
    assert json.loads(said.read_text())["max_position_embeddings"] == 4096
