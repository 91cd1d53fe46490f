"""Every shipped recipe runs: three steps, with its model swapped for a tiny one of the same family."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from llmkit import run
from llmkit.core.console import Console
from llmkit.data.node import Arithmetic, Docstrings, Jsonl
from llmkit.parallel.node import Parallel
from llmkit.recipe.load import load_recipe
from llmkit.recipe.shipped import recipes
from llmkit.stages.best_of import BestOf
from llmkit.stages.constitutional import Constitutional
from llmkit.stages.evaluate import Evaluate
from llmkit.stages.merge import Merge
from llmkit.stages.training import Training
from llmkit.stages.trl import TrainerRows, Trl
from tests.conftest import make_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 448, "max_position_embeddings": 512, "head_dim": 8}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "smollm2": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama": ("LlamaConfig", {}),
    "qwen2.5": ("Qwen2Config", {}),
    "qwen3-30b": ("Qwen3MoeConfig", MIXTURE),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {}),
    "mixtral": ("MixtralConfig", MIXTURE),
    "gemma-2": ("Gemma2Config", {"sliding_window": 16}),
    "gemma-3": ("Gemma3TextConfig", {"sliding_window": 16}),
    "phi": ("Phi3Config", {}),
    "olmo-2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {}),
}
"""By what the last part of a model's name holds; the first that fits counts."""
NAMED = {"meta-llama-3": "llama"}


def family(name):
    last = name.lower().rpartition("/")[2]
    return next(key for key in FAMILIES if key in last)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a tiny model by its family."""
    import torch
    import transformers

    made = {}

    def folder(key):
        if key not in made:
            kind, more = FAMILIES[key]
            torch.manual_seed(0)
            config = getattr(transformers, kind)(**(SIZES | more))
            made[key] = tmp_path_factory.mktemp(key.replace(".", "-"))
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[key])
            make_tokenizer().save_pretrained(made[key])
        return made[key]

    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the files that recipes name."""
    place = tmp_path_factory.mktemp("work")
    said = [
        {"role": "user", "content": "hello world"},
        {"role": "assistant", "content": "the lazy dog"},
    ]
    rows = [{"messages": [{**said[0], "content": f"hello world {i}"}, said[1]]} for i in range(120)]
    for name in ("train", "valid"):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"prompt": f"what is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]
    (place / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    texts = [{"text": " ".join(["the quick brown fox jumps over the lazy dog"] * 20) + f" {i}"} for i in range(60)]
    (place / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    pairs = [
        {"prompt": row["messages"][:1], "chosen": "the lazy dog", "rejected": f"fox {i}"} for i, row in enumerate(rows)
    ]
    single = [
        {"prompt": f"hello {i}", "completion": row["rejected"], "label": i % 2 > 0} for i, row in enumerate(pairs)
    ]
    (place / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    for name in ("pairs", "valid_pairs"):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    prompts = [{"prompt": f"hello world {i}", "answer": str(i)} for i in range(120)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    labelled = [{"text": f"hello world {i}", "label": ("good", "bad")[i % 3 == 0]} for i in range(30)]
    words = [{"tokens": ["hello", "lazy", "dog"], "tags": ["O", "B-X", ("O", "I-X")[i % 2]]} for i in range(30)]
    for task, made in {"sequence": labelled, "token": words}.items():
        (place / f"classify-{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    asked = [{"prompt": row["messages"][:1], "cluster": str(i)} for i, row in enumerate(rows)]
    pairs = [{**row, "chosen": "the lazy dog", "rejected": f"fox {i}"} for i, row in enumerate(asked)]
    steps = [
        {**row, "completions": ["the lazy dog", f"fox {i}"], "labels": [True, False]} for i, row in enumerate(asked)
    ]
    for task, made in {"outcome": pairs, "process": steps}.items():
        (place / f"reward-{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    _scorer(place / "scorer")
    (place / "texts").mkdir()
    for i, row in enumerate(texts):  # some of them are held out
        (place / "texts" / f"{i}.txt").write_text(row["text"])
    return place


def _scorer(place):
    """A reward model of the same words."""
    import transformers

    config = transformers.LlamaConfig(**SIZES, num_labels=1)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(place)
    make_tokenizer().save_pretrained(place)


def small(node, model, out):
    """The recipe over a tiny model: shorter, fewer, and all else as it is written."""
    overflow = "truncate" if node.kind == "sft" and node.data.overflow == "drop" else node.data.overflow
    kind = f"{node.kind}-{node.task}" if node.kind in ("classify", "reward") else node.kind
    kind = "kto" if node.kind == "preference" and node.loss.kind == "kto" else kind
    sources = {key: rows(getattr(node.data, key), kind) for key in ("train", "valid")}
    data = dataclasses.replace(node.data, max_length=64, overflow=overflow, **sources)
    evaluate = node.evaluate
    if data.sources("valid") and node.kind in ("sft", "preference", "policy", "ppo"):
        evaluate = dataclasses.replace(evaluate, samples=min(1, evaluate.samples), max_tokens=2)
    if data.sources("valid") and node.kind in ("policy", "ppo"):
        evaluate = dataclasses.replace(evaluate, rows=2)
    name = dataclasses.replace(node.model, name=str(model))
    batch = dataclasses.replace(node.batch, **{node.counted: 4})
    more = {"evaluate": evaluate, "parallel": Parallel(), "epochs": None, "steps": 3, "out": str(out)}
    if getattr(node.adapter, "train", ()):  # a tiny model has two layers
        more["adapter"] = dataclasses.replace(node.adapter, train=("*.layers.1.*", "model.norm.weight"))
    if node.kind in ("policy", "ppo"):
        more["rollout"] = dataclasses.replace(node.rollout, group=2, max_tokens=4)
        more["reward"] = tuple(
            dataclasses.replace(one, path="scorer") if one.kind == "model" else one for one in node.reward
        )
    if node.kind == "distill":
        teacher = dataclasses.replace(node.teacher, name=str(model))
        sampling = dataclasses.replace(node.sampling, max_tokens=4)
        more |= {"teacher": teacher, "sampling": sampling}
        if node.answers.kind == "teacher":
            more["answers"] = dataclasses.replace(node.answers, sampling=sampling)
    if node.kind == "draft" and hasattr(node.drafter, "layers"):
        more["drafter"] = dataclasses.replace(node.drafter, layers=1)
    return dataclasses.replace(node, model=name, data=data, batch=batch, **more)


def brief(node, model, out):
    """A trainer of TRL over a tiny model: two steps of few answers."""
    known = {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 2}
    arguments = {**node.arguments, **{name: value for name, value in known.items() if name in node.arguments}}
    arguments |= {"max_steps": 2, "gradient_accumulation_steps": 1}
    kept = [name for name in ("save_steps", "num_train_epochs") if name in arguments]
    arguments = {name: value for name, value in arguments.items() if name not in kept}
    name = "prompts.jsonl" if node.reward else "pairs.jsonl"
    data = TrainerRows(train=(Jsonl(path=name),))
    model = dataclasses.replace(node.model, name=str(model))
    return dataclasses.replace(node, model=model, data=data, arguments=arguments, out=str(out))


def rows(sources, kind=""):
    """The sources, but a small file in the place of what is made from the running Python, and of labelled rows."""
    if kind.startswith(("classify", "reward")):
        return tuple(Jsonl(path=f"{kind}.jsonl") for _ in sources)
    if kind in ("policy", "ppo"):
        return tuple(Jsonl(path="prompts.jsonl") for _ in sources)
    if kind == "preference":
        return tuple(Jsonl(path="pairs.jsonl") for _ in sources)
    if kind == "kto":
        return tuple(Jsonl(path="labelled.jsonl") for _ in sources)
    return tuple(Jsonl(path="train.jsonl") if _unlike(source) else source for source in sources)


def _unlike(source):
    """Whether a source is of other rows than those that are here."""
    return isinstance(source, Arithmetic | Docstrings) or "question" in getattr(source, "columns", {}).values()


ALONE = [
    name
    for name in recipes()
    if not name.startswith(("quickstart", "merge/", "serve/", "draft/refresh", "constitutional/pipeline", "pipelines/"))
]
"""Without those that go on from what another recipe left, and those of several stages (test_pipelines.py)."""


@pytest.mark.parametrize("name", ALONE)
def test_it_runs_three_steps(name, models, folder, tmp_path, monkeypatch):
    path = recipes()[name]
    monkeypatch.chdir(folder)
    recipe = load_recipe(os.path.relpath(path, folder))
    made = {}
    for stage, node in recipe.stages:
        model = made.get(node.model.name) or models(family(node.model.name))
        if isinstance(node, Training) and not node.trained:
            sources = {key: rows(getattr(node.data, key)) for key in ("train", "valid")}
            more = {"data": dataclasses.replace(node.data, **sources), "out": str(tmp_path / "run")}
            name = dataclasses.replace(node.model, name=str(model))
            artifact = run(dataclasses.replace(node, model=name, **more), console=Console(quiet=True))
            assert (artifact.model() / "draft.json").is_file()
        elif isinstance(node, Trl):
            artifact = run(brief(node, model, tmp_path / "run"), console=Console(quiet=True))
            assert artifact.manifest["step"] == 2 and any(Path(artifact.model()).iterdir())
        elif isinstance(node, Training):
            artifact = run(small(node, model, tmp_path / (stage or "run")), console=Console(quiet=True))
            assert artifact.manifest["step"] == 3 and any(Path(artifact.model()).iterdir())
            made[node.out] = artifact.folder
        elif isinstance(node, BestOf):
            load = dataclasses.replace(node.model, name=str(model))
            sampling = dataclasses.replace(node.sampling, max_tokens=4)
            more = {"rows": 2, "samples": 2, "max_length": 128, "out": str(tmp_path / "run")}
            made = dataclasses.replace(node, model=load, data=rows(node.data), sampling=sampling, **more)
            artifact = run(made, console=Console(quiet=True))
            assert len((artifact.folder / "answers.jsonl").read_text().splitlines()) == 3
        elif isinstance(node, Constitutional):
            load, some = dataclasses.replace(node.model, name=str(model)), (Jsonl(path="train.jsonl"),)
            sources = {key: some for key in ("prompts", "harmless") if getattr(node, key)} | {"rows": 2}
            sampling = dataclasses.replace(node.sampling, max_tokens=4)
            more = {"model": load, "sampling": sampling, "out": str(tmp_path / "run"), "critic": None, **sources}
            assert run(dataclasses.replace(node, **more), console=Console(quiet=True)).manifest["digests"]
        elif isinstance(node, Merge):
            load = dataclasses.replace(node.model, name=str(model))
            made[node.out] = run(
                dataclasses.replace(node, model=load, out=str(tmp_path / stage)), console=Console(quiet=True)
            ).folder
        else:
            assert isinstance(node, Evaluate)
            load = dataclasses.replace(node.model, name=str(model))
            tasks = tuple(_short(task) for task in node.tasks)
            run(
                dataclasses.replace(node, model=load, tasks=tasks, out=str(tmp_path / "eval")),
                console=Console(quiet=True),
            )


def _short(task):
    """A task over little text."""
    held = {field.name for field in dataclasses.fields(task)}
    sizes = {"rows": 2, "lengths": (256, 320), "depths": 2, "samples": 1, "length": 128, "buckets": 2, "max_length": 64}
    more = {"data": rows(task.data)} if "data" in held else {}
    return dataclasses.replace(task, **{key: value for key, value in sizes.items() if key in held}, **more)


def test_every_family_has_full_lora_and_qlora_and_long_and_classification():
    names = set(recipes())
    for asked in (
        "smollm2",
        "llama3",
        "qwen2.5",
        "qwen3",
        "mistral",
        "gemma2",
        "gemma3",
        "phi3",
        "phi4",
        "olmo2",
        "granite",
    ):
        assert any(name.startswith(f"models/{asked}") for name in names), asked
    for way in ("full", "-lora", "-qlora"):
        assert any(name.endswith(way) for name in names)
    assert any(name.startswith("long/") for name in names)
