"""Whole classification stages on tiny models: they learn, others load the result, and a kill changes nothing."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from llmkit import Classify, Evaluate, Merge, Sft, run
from llmkit.checkpoint import state
from llmkit.core.console import Console
from llmkit.core.errors import DataError, LlmkitError, ModelError, RecipeError
from llmkit.core.run import Grants
from tests import faults
from tests.conftest import make_model, make_tokenizer

FILLERS = ["the", "quick", "fox", "jumps", "over", "lazy", "model", "text"]
LABELS = {"hello": "greeting", "dog": "animal", "brown": "colour"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Rows of three classes, of which one is rare; each class has its last word."""
    path, dice = tmp_path_factory.mktemp("texts") / "rows.jsonl", np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(48):
            word = ["dog", "dog", "dog", "brown", "dog", "brown", "dog", "hello"][i % 8]
            words = dice.choice(FILLERS, dice.integers(2, 14)).tolist()
            row = {
                "text": " ".join([*words, word]),
                "label": LABELS[word],
                "group": "long" if len(words) > 7 else "short",
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Rows of words with tags."""
    path, dice = tmp_path_factory.mktemp("words") / "rows.jsonl", np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(32):
            tokens = dice.choice([*FILLERS, "hello", "Zanzibar"], dice.integers(2, 9)).tolist()
            tags = ["B-GREET" if word == "hello" else "B-PLACE" if word == "Zanzibar" else "O" for word in tokens]
            file.write(json.dumps({"tokens": tokens, "tags": tags}) + "\n")
    return path


def classify(model, rows, out, data=(), **more):
    source = [{"kind": "jsonl", "path": str(rows)}]
    options = {
        "model": str(model),
        "data": {"train": source, "valid": source, "max_length": 64, **dict(data)},
        "batch": {"rows": 8},
        "steps": 12,
        "optim": {"kind": "adamw", "lr": 1e-2},
        "out": str(out),
    }
    return Classify(**(options | more))


def go(node, **more):
    return run(node, console=Console(quiet=True), **more)


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "evaluate"]


def elsewhere(artifact, task="sequence", labels=3):
    """The result as plain transformers or peft loads it."""
    import peft
    import transformers

    kind = {"sequence": "SequenceClassification", "token": "TokenClassification"}[task]
    if (artifact.model() / "adapter_config.json").exists():
        return getattr(peft, f"AutoPeftModelFor{kind}").from_pretrained(artifact.model(), num_labels=labels).eval()
    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(artifact.model()).eval()


def same_logits(artifact, rows, task="sequence", close=2e-4):
    """Whether plain transformers gives, row by row, the log-probabilities of our table, which come from packed rows."""
    from transformers import AutoTokenizer

    model, tokenizer = elsewhere(artifact, task), AutoTokenizer.from_pretrained(artifact.model())
    table = [json.loads(line) for line in (artifact.folder / "predictions.jsonl").read_text().splitlines()]
    ours = [[v for k, v in row["scores"].items() if k.startswith("choice_")] for row in table]
    theirs = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        text = row["text"] if task == "sequence" else " ".join(row["tokens"])
        made = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        places = made.pop("offset_mapping")[0].tolist()
        logps = model(**made).logits[0].float().log_softmax(-1).detach()
        if task == "sequence":
            theirs.append(logps.tolist())
            continue
        starts = np.cumsum([0] + [len(word) + 1 for word in row["tokens"]])[:-1]
        theirs += [logps[next(i for i, (_, end) in enumerate(places) if end > s)].tolist() for s in starts]
    np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=close)


FULL = {"adapter": "none", "optim": {"kind": "adamw", "lr": 3e-3}}
METHODS = {
    "lora": {},
    "full": {**FULL, "memory": {"recompute": "full"}, "class_weights": "balanced"},
    "qlora": {"quant": "bnb_nf4", "loss": {"kind": "cross_entropy", "label_smoothing": 0.05}},
    "bf16_mixed": {"precision": "bf16_mixed", "data": {"sampler": {"balance": "label"}}},
    "buckets": {"loss": {"kind": "focal", "gamma": 1.0}, "data": {"packing": "none", "length_buckets": 3}},
    "dro": {"loss": {"kind": "group_dro", "step": 0.1}, "data": {"sampler": {"balance": "group"}}, "neftune": 5.0},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_plain_libraries_say_the_same(method, tiny, texts, tmp_path):
    artifact = go(classify(tiny, texts, tmp_path / "run", **METHODS[method]))
    before, after = evaluations(artifact.folder)
    assert after["valid.f1"] > before["valid.f1"] and after["valid.loss"] < before["valid.loss"] - 0.1
    assert artifact.manifest["labels"] == sorted(LABELS.values())
    artifact.verify()
    if method not in ("qlora", "bf16_mixed"):  # those compute in other types there
        same_logits(artifact, texts)


def test_words_are_classified_and_spans_scored(tiny, words, tmp_path):
    artifact = go(classify(tiny, words, tmp_path / "run", task="token", steps=20))
    before, after = evaluations(artifact.folder)
    assert after["valid.f1"] > before["valid.f1"] and after["valid.span_f1"] > before["valid.span_f1"]
    same_logits(artifact, words, "token")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("encoder")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=448)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**sizes, pad_token_id=0)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_an_encoder_is_trained_unpacked_and_refused_packed(encoder, texts, tmp_path):
    with pytest.raises(DataError, match="packing=none"):
        go(classify(encoder, texts, tmp_path / "packed", **FULL))
    with pytest.raises(ModelError, match=r"pooler.dense is new, and adapter lora does not save it"):
        go(classify(encoder, texts, tmp_path / "lora", {"packing": "none"}))
    artifact = go(classify(encoder, texts, tmp_path / "run", {"packing": "none"}, **FULL))
    before, after = evaluations(artifact.folder)
    assert after["valid.loss"] < before["valid.loss"] - 0.1
    same_logits(artifact, texts)


@pytest.fixture(scope="module")
def trained(tiny, texts, tmp_path_factory):
    return go(classify(tiny, texts, tmp_path_factory.mktemp("trained") / "run"))


def test_a_result_is_evaluated_merged_and_reported(trained, texts, tmp_path):
    task = {"kind": "classification", "data": [{"kind": "jsonl", "path": str(texts)}], "max_length": 64}
    merged = go(Merge(model=str(trained.folder), out=str(tmp_path / "merged")))
    assert merged.manifest["logit_difference"] <= merged.manifest["bound"]
    tables = []
    for model in (trained, merged):
        made = go(Evaluate(model=str(model.folder), tasks=[task], out=str(tmp_path / f"of-{model.folder.name}")))
        reports = {(r["metric"], r["slice"]): r for r in made.manifest["reports"]}
        assert reports["classification.accuracy", "all"]["value"] == evaluations(trained.folder)[-1]["valid.accuracy"]
        assert {s for m, s in reports if m == "classification.recall"} == set(LABELS.values())
        f1 = reports["classification.f1", "all"]
        assert f1["low"] <= f1["value"] <= f1["high"]
        tables.append([json.loads(line) for line in (made.folder / "predictions.jsonl").read_text().splitlines()])
    assert [row["prediction"] for row in tables[0]] == [row["prediction"] for row in tables[1]]
    page = (trained.folder / "report.html").read_text()
    assert "Confusion: valid" in page and "valid.f1" in page and "greeting" in page


def test_what_a_classifier_cannot_do_is_refused_by_name(trained, tiny, texts, rows, tmp_path):
    from llmkit.cli.text import Asking, generate

    with pytest.raises(ModelError, match="is a sequence classifier, and writes no text"):
        generate(Asking(str(trained.folder), {}), "hello", False)
    source = [{"kind": "jsonl", "path": str(rows)}]
    with pytest.raises(ModelError, match="writes no text"):
        task = {"kind": "perplexity", "data": source}
        go(Evaluate(model=str(trained.folder), tasks=[task], out=str(tmp_path / "a")))
    with pytest.raises(ModelError, match="is no classifier"):
        task = {"kind": "classification", "data": [{"kind": "jsonl", "path": str(texts)}]}
        go(Evaluate(model=str(tiny), tasks=[task], out=str(tmp_path / "b")))
    merged = go(Merge(model=str(trained.folder), out=str(tmp_path / "merged")))
    with pytest.raises(ModelError, match="not a language model"):
        go(Sft(model=str(merged.folder), data={"train": source}, batch={"rows": 2}, out=str(tmp_path / "c")))
    with pytest.raises(ModelError, match="classifier of animal, colour, greeting already"):
        go(classify(merged.folder, texts, tmp_path / "d", labels=("greeting", "animal", "colour")))
    on = go(classify(merged.folder, texts, tmp_path / "e", steps=1))  # the same classes: its head goes on
    assert evaluations(on.folder)[0]["valid.loss"] == pytest.approx(evaluations(trained.folder)[-1]["valid.loss"], 1e-4)


def test_a_family_without_a_classifier_is_refused(texts, tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=448)
    GraniteForCausalLM(GraniteConfig(**sizes, num_key_value_heads=2)).save_pretrained(tmp_path / "granite")
    make_tokenizer().save_pretrained(tmp_path / "granite")
    with pytest.raises(ModelError, match="no sequence classifier of .*granite"):
        go(classify(tmp_path / "granite", texts, tmp_path / "run"))


def test_a_tokenizer_without_padding_gets_one_that_the_result_carries(texts, tmp_path):
    from transformers import AutoConfig

    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    make_model(pad_token_id=None).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    artifact = go(classify(tmp_path / "model", texts, tmp_path / "run", steps=1, adapter="none"))
    assert AutoConfig.from_pretrained(artifact.model()).pad_token_id == tokenizer.eos_token_id
    same_logits(artifact, texts)


CONFLICTS = {
    "checkpoint.best": {"checkpoint": {"best": "valid.perplexity"}, "evaluate": {"every": 2}},
    "class_weights": {"class_weights": "balanced", "loss": "group_dro"},
    "class_weights.x": {"class_weights": {"x": 1.0}, "labels": ("a", "b")},
    "class_weights.a": {"class_weights": {"a": -1.0}, "labels": ("a", "b")},
    "labels": {"labels": ("a", "a")},
    "loss.kind": {"task": "token", "loss": "group_dro"},
    "adapter.kind": {"adapter": {"kind": "p_tuning"}, "data": {"packing": "none"}},
    "data.sampler.balance": {"task": "token", "data": {"sampler": {"balance": "label"}}},
    "data.overflow": {"data": {"overflow": "split"}},
    "data.train_on": {"data": {"train_on": "all"}},
    "data.dedup": {"data": {"dedup": {"kind": "exact"}}},
    "evaluate.samples": {"evaluate": {"samples": 9}},
}


@pytest.mark.parametrize("key", CONFLICTS)
def test_contradictions_name_their_key(key, tiny, texts, tmp_path):
    with pytest.raises(RecipeError) as caught:
        classify(tiny, texts, tmp_path / "run", **CONFLICTS[key])
    assert [p.key for p in caught.value.problems] == [key]


def test_a_language_model_has_no_labels_to_balance_and_no_f1():
    source = [{"kind": "jsonl", "path": "rows.jsonl"}]
    with pytest.raises(RecipeError, match="rows have no label in kind sft"):
        Sft(model="x", data={"train": source, "sampler": {"balance": "label"}}, out="x")
    with pytest.raises(RecipeError, match=r"valid.f1 is not measured by kind sft"):
        data, best = {"train": source, "valid": source}, {"best": "valid.f1"}
        Sft(model="x", data=data, out="x", checkpoint=best, evaluate={"every": 2})


@pytest.mark.parametrize("best,why", [("valid.recall.rare", "no row of data.valid"), ("valid.span_f1", "no spans")])
def test_a_best_that_the_rows_cannot_measure_is_refused(best, why, tiny, texts, tmp_path):
    how = {"checkpoint": {"best": best}, "evaluate": {"every": 2}, "labels": (*LABELS.values(), "rare")}
    with pytest.raises(DataError, match=why):
        go(classify(tiny, texts, tmp_path / "run", **how))


def in_child(node):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        go(node)
        code = 0
    except LlmkitError as error:
        code = error.code
    finally:
        os._exit(code)


def outcome(folder):
    timings = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = (folder / "model" / "adapter_model.safetensors").read_bytes()
    return weights, [{k: v for k, v in line.items() if k not in timings} for line in lines]


@pytest.mark.parametrize("first,then", [("cross_entropy", "group_dro"), ("group_dro", "cross_entropy")])
def test_another_loss_that_is_accepted_begins_anew(first, then, tiny, texts, tmp_path, capfd):
    def node(loss):
        return classify(tiny, texts, tmp_path / "run", loss=loss, steps=4, checkpoint={"every": 2})

    assert faults.in_child(lambda: faults.killed_after(2, lambda: go(node(first)))) == -signal.SIGKILL
    with pytest.raises(RecipeError, match=r"recipe\.loss"):
        go(node(then))
    artifact = go(node(then), grants=Grants(accept=("loss", "data", "files")))
    said = capfd.readouterr().err
    assert ("another loss: its state begins anew" in said) == (then == "group_dro") and "from step 2" in said
    logs = state.load(artifact.folder / "checkpoints" / "step-4")[0].get("loss/group_logs")
    assert (logs is not None) == (then == "group_dro")
    assert logs is None or float(logs.exp().sum()) == pytest.approx(1.0)


def test_a_killed_run_ends_as_if_it_had_not_been(tiny, texts, tmp_path):
    """Group-DRO's weights, the balanced order, NEFTune and the best metric all go on where they were."""

    def node(out):
        more = {"loss": {"kind": "group_dro", "step": 0.5}, "neftune": 5.0, "steps": 9, "micro_batch": 1}
        more |= {"checkpoint": {"every": 3, "best": "valid.f1"}, "evaluate": {"every": 4, "rows": 12}}
        data = {"sampler": {"balance": "label"}, "max_length": 24}
        return classify(tiny, texts, out, data, adapter={"kind": "lora", "rank": 2, "dropout": 0.1}, **more)

    go(node(tmp_path / "whole"))
    for lines in (9,):
        out = tmp_path / "killed"
        shutil.rmtree(out, ignore_errors=True)
        pid = in_child(node(out))
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < lines:
            assert time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG)[0] == 0
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert os.waitstatus_to_exitcode(os.waitpid(in_child(node(out)), 0)[1]) == 0
        assert outcome(out) == outcome(tmp_path / "whole")
    trained = [line for line in outcome(tmp_path / "whole")[1] if line["event"] == "train"]
    assert all("group.long" in line or "group.short" in line for line in trained)
    evaluated = evaluations(tmp_path / "whole")
    best = json.loads((tmp_path / "whole" / "manifest.json").read_text())["best_step"]
    assert best == max(evaluated[1:], key=lambda line: (line["valid.f1"], -line["step"]))["step"]
