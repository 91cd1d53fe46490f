"""LoRA's ways in whole runs: exact when gone on with, loaded by others, merged; new tokens from recipe to use."""

import hashlib
import json
import shutil

import pytest
import torch
import transformers as hf
from peft import AutoPeftModelForCausalLM

from llmkit import Evaluate, Merge, Sft
from llmkit.core.console import Console
from llmkit.core.errors import ModelError, RecipeError
from llmkit.models.load import How, load
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from tests.adapters.properties import folder
from tests.conftest import make_model, make_tokenizer
from tests.stages.test_sft import go, metrics, sft

IDS = torch.tensor([[5, 77, 301, 8, 260, 19, 33]])
WAYS = {
    "pissa": {"adapter": {"kind": "lora", "rank": 4, "init": "pissa", "pissa_niter": 2}},
    "olora": {"adapter": {"kind": "lora", "rank": 4, "init": "olora", "layers": ["0-1"]}},
    "eva": {"adapter": {"kind": "lora", "rank": 4, "init": "eva", "eva_tokens": 64}, "epochs": 1, "steps": None},
    "lora_fa": {"adapter": {"kind": "lora", "rank": 4, "lora_fa": True}},
    "lora_plus": {"adapter": {"kind": "lora", "rank": 4, "lora_plus": 16.0}, "optim": {"kind": "adamw", "lr": 1e-3}},
    "loftq": {"adapter": {"kind": "lora", "rank": 4, "init": "loftq"}, "quant": "bnb_nf4"},
    "pissa nf4": {"adapter": {"kind": "lora", "rank": 4, "init": "pissa"}, "quant": "bnb_nf4"},
    "tokens": {"model": {"add_tokens": ["<tool>"], "add_special_tokens": ["<|call|>"]}},
    "freeze": {"adapter": {"kind": "none", "train": ["*.layers.*"], "freeze": ["*norm.weight"]}},
}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def opened(path, **how):
    ref = ModelRef(name=str(path))
    return load(resolve(ref), ref, How(**how))


def weights(folder):
    name = next(folder.glob("model/*model.safetensors"))
    return hashlib.sha256(name.read_bytes()).hexdigest()


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_goes_on_ends_as_if_it_had_not_stopped(way, tiny, rows, tmp_path):
    more = dict(WAYS[way])
    more["model"] = {"name": str(tiny), **more.get("model", {})}
    more |= {"checkpoint": {"every": 2, "keep": 9}, "out": str(tmp_path / "whole")}
    whole = go(sft(tiny, rows, more.pop("out"), **more))
    evaluated = [line["valid.loss"] for line in metrics(whole.folder) if line["event"] == "evaluate"]
    assert evaluated[-1] < evaluated[0] - 0.05
    again = tmp_path / "again"
    again.mkdir()
    for name in ("recipe.yaml", "resolved.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints/step-2"):
        if (whole.folder / name).is_dir():
            shutil.copytree(whole.folder / name, again / name)
        elif (whole.folder / name).is_file():
            shutil.copy(whole.folder / name, again / name)
    told = []
    console = Console(quiet=True)
    console.notice = told.append
    from llmkit import run

    run(sft(tiny, rows, again, **more), console=console)
    assert any("going on from step 2" in line for line in told)
    assert weights(again) == weights(whole.folder) and metrics(again) == metrics(whole.folder)


def test_experts_train_under_recompute_and_over_a_quantised_base_and_merge(rows, tmp_path):
    adapter = {"kind": "lora", "rank": 2, "parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    plain = go(sft(folder("mixtral"), rows, tmp_path / "plain", adapter=adapter)).folder
    again = go(sft(folder("mixtral"), rows, tmp_path / "again", adapter=adapter, memory={"recompute": "full"})).folder
    losses = [[line["loss"] for line in metrics(one) if line["event"] == "train"] for one in (plain, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0] - 0.1
    quantised = go(sft(folder("mixtral"), rows, tmp_path / "nf4", adapter=adapter, quant="bnb_nf4")).folder
    for run in (plain, quantised):
        merged = go(Merge(model=str(run), out=str(run / "merged")))
        whole = hf.AutoModelForCausalLM.from_pretrained(merged.folder / "model")
        ours = opened(run, quant=resolve(ModelRef(name=str(run))).quant)
        torch.testing.assert_close(logits(whole), logits(ours.model), rtol=1e-3, atol=1e-4)


def taught(base, rows, out, **more):
    """A run whose rows and template hold new tokens."""
    texts = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    for said in texts:
        said[1]["content"] = "<tool> " + said[1]["content"]
    new = out.with_suffix(".jsonl")
    new.write_text("".join(json.dumps({"messages": said}) + "\n" for said in texts))
    template = out.with_suffix(".jinja")
    template.write_text(make_tokenizer().chat_template.replace("m['content']", "'<|call|>' + m['content']"))
    model = {"name": str(base), "template": str(template), "add_tokens": ["<tool>"]}
    return go(sft(base, new, out, **({"model": model | {"add_special_tokens": ["<|call|>"]}} | more)))


@pytest.fixture(scope="module", params=["tied", "own head"])
def small(request, tmp_path_factory):
    """A model whose embeddings have no row to spare."""
    base, tokenizer = tmp_path_factory.mktemp("small"), make_tokenizer()
    make_model(vocab_size=len(tokenizer), tie_word_embeddings=request.param == "tied").save_pretrained(base)
    tokenizer.save_pretrained(base)
    return base, len(tokenizer), request.param == "tied"


@pytest.mark.parametrize("quant", ["none", "bnb_nf4"])
def test_new_tokens_are_learned_saved_merged_and_used(small, quant, rows, tmp_path):
    base, size, tied = small
    made = taught(base, rows, tmp_path / "run", quant=quant).folder
    ids = torch.tensor([[5, size, 8, size + 1, 33]])
    ours = opened(made, quant=resolve(ModelRef(name=str(made))).quant)
    assert len(ours.tokenizer) == size + 2 == ours.model.get_input_embeddings().weight.shape[0]
    assert ours.tokenizer("a <tool> b")["input_ids"].count(size) == 1
    assert ours.tokenizer.decode([size, size + 1], skip_special_tokens=True) == "<tool>"
    if quant == "none":
        theirs = AutoPeftModelForCausalLM.from_pretrained(made / "model")
        torch.testing.assert_close(logits(ours.model, ids), logits(theirs, ids), rtol=1e-5, atol=1e-6)
    start = opened(base)
    mean = start.model.get_input_embeddings().weight.mean(0)
    wrapped = ours.model.base_model.model.get_input_embeddings().token_adapter
    moved = (wrapped.trainable_tokens_delta["default"] - mean).abs().max(1).values
    assert (moved > 1e-3).all()  # both are learned, by the rows' text and by the template
    merged = go(Merge(model=str(made), out=str(tmp_path / "merged")))
    whole = hf.AutoModelForCausalLM.from_pretrained(merged.folder / "model")
    assert whole.config.vocab_size == size + 2 and whole.config.tie_word_embeddings == tied
    torch.testing.assert_close(logits(whole, ids), logits(ours.model, ids), rtol=1e-3, atol=1e-4)


def test_new_tokens_of_a_whole_model_and_its_evaluation(small, rows, tmp_path):
    base, size, _ = small
    made = taught(base, rows, tmp_path / "run", adapter="none").folder
    whole = hf.AutoModelForCausalLM.from_pretrained(made / "model")
    assert whole.config.vocab_size == size + 2
    task = {"kind": "perplexity", "data": [{"kind": "jsonl", "path": str(rows)}]}
    assert go(Evaluate(model=str(made), tasks=[task], out=str(tmp_path / "evaluated"))).manifest["reports"]


def test_a_row_to_spare_is_used_and_the_base_stays_as_wide(tiny, rows, tmp_path):
    made = taught(tiny, rows, tmp_path / "run").folder
    assert opened(made).model.get_input_embeddings().weight.shape[0] == 448
    theirs = AutoPeftModelForCausalLM.from_pretrained(made / "model")
    torch.testing.assert_close(logits(opened(made).model), logits(theirs), rtol=1e-5, atol=1e-6)


def test_a_token_that_is_there_already_is_refused_before_anything_is_made(tiny, rows, tmp_path):
    with pytest.raises(
        ModelError, match=r"model\.add_tokens: '<\|im_end\|>' is a token of .* already; .*trainable_tokens"
    ):
        go(sft(tiny, rows, tmp_path / "run", model={"name": str(tiny), "add_tokens": ["<|im_end|>"]}))
    assert not (tmp_path / "run" / "checkpoints").exists()


WRONG = {
    r"quant\.kind: contradicts adapter\.init: loftq .* quant is none": {"adapter": {"kind": "lora", "init": "loftq"}},
    r"quant\.kind: contradicts adapter\.init: loftq .* quant is bnb_int8": {
        "adapter": {"kind": "lora", "init": "loftq"},
        "quant": "bnb_int8",
    },
    r"quant\.kind: contradicts adapter\.kind": {"adapter": "none", "quant": "bnb_nf4"},
    r"adapter\.parameters: contradicts adapter\.dropout": {
        "adapter": {"kind": "lora", "parameters": ["experts.down_proj"], "dropout": 0.1}
    },
    r"adapter\.init: contradicts adapter\.dora": {"adapter": {"kind": "lora", "init": "pissa", "dora": True}},
    r"adapter\.pissa_niter: contradicts adapter\.init": {"adapter": {"kind": "lora", "pissa_niter": 4}},
    r"adapter\.lora_plus: contradicts adapter\.lora_fa": {"adapter": {"kind": "lora", "lora_fa": True, "lora_plus": 4}},
    r"adapter\.layers: 3-x is no span": {"adapter": {"kind": "lora", "layers": ["3-x"]}},
    r"model\.add_tokens: contradicts model\.add_special_tokens": {
        "model": {"name": "m", "add_tokens": ["<a>"], "add_special_tokens": ["<a>"]}
    },
    r"model\.add_tokens: ' ' is blank": {"model": {"name": "m", "add_tokens": [" "]}},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_contradicts_is_refused_by_both_names(said, tmp_path):
    with pytest.raises(RecipeError, match=said):
        Sft(**({"model": "m", "data": {"train": []}, "out": str(tmp_path)} | WRONG[said]))
