"""Configurations of other tools: each key has a fate, and what is taken over means the same here."""

import json

import pytest
import yaml

from llmkit.core.elsewhere import NAMES
from llmkit.core.errors import RecipeError
from llmkit.core.hints import hints, options
from llmkit.recipe.foreign.read import imported
from llmkit.recipe.foreign.write import text
from llmkit.recipe.load import load_recipe

AXOLOTL = """
base_model: owner/model
model_type: AutoModelForCausalLM
load_in_4bit: true
load_in_8bit: false
adapter: qlora
lora_r: 8
lora_alpha: 24
lora_dropout: 0.1
lora_target_linear: true
lora_modules_to_save: [embed_tokens]
datasets:
  - {path: rows.jsonl, type: chat_template, field_messages: talk}
  - {path: owner/rows, name: small, split: "train[:5%]", type: sharegpt}
val_set_size: 0.1
sequence_len: 512
sample_packing: true
train_on_inputs: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: paged_adamw_8bit
learning_rate: 2e-4
lr_scheduler: cosine
warmup_steps: 10
weight_decay: 0.01
bf16: auto
tf32: true
gradient_checkpointing: true
evals_per_epoch: 2
saves_per_epoch: 1
early_stopping_patience: 3
wandb_project: mine
wandb_entity:
attn_implementation: sdpa
neftune_noise_alpha: 5
special_tokens: {pad_token: "<pad>"}
liger_rms_norm: true
relora_steps: 100
a_key_of_tomorrow: 1
output_dir: runs/a
"""
FACTORY = """
model_name_or_path: owner/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj, v_proj
pissa_init: true
loraplus_lr_ratio: 16.0
dataset: mine,theirs
template: qwen3
cutoff_len: 512
max_samples: 100
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
save_steps: 50
report_to: [tensorboard]
val_size: 0.1
eval_strategy: steps
eval_steps: 25
output_dir: runs/b
"""
TRL = """
model_name_or_path: owner/model
torch_dtype: bfloat16
attn_implementation: flash_attention_2
use_peft: true
lora_r: 4
lora_target_modules: [q_proj, v_proj]
chat_template: "{% for m in messages %}{{ m.content }}{% endfor %}"
dataset_name: owner/rows
dataset_config: small
eval_strategy: epoch
max_length: 256
packing: true
assistant_only_loss: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-4
num_train_epochs: 1
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
warmup_ratio: 0.1
max_grad_norm: 0.2
bf16: true
gradient_checkpointing: true
save_strategy: "no"
loss_type: dft
push_to_hub: true
hub_model_id: me/result
report_to: none
output_dir: runs/c
"""
ALL = {"axolotl": AXOLOTL, "llama-factory": FACTORY, "trl": TRL}


@pytest.fixture
def draft(tmp_path):
    def made(config):
        path = tmp_path / "config.yaml"
        path.write_text(config)
        (tmp_path / "data").mkdir(exist_ok=True)
        table = {
            "mine": {"file_name": "mine.json", "columns": {"prompt": "ask", "response": "say"}},
            "theirs": {"hf_hub_url": "owner/rows", "formatting": "sharegpt", "columns": {"messages": "talk"}},
        }
        (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(table))
        return imported(path)

    return made


@pytest.mark.parametrize("tool", ALL)
def test_every_key_has_a_fate_and_the_recipe_loads(tool, draft, tmp_path):
    made = draft(ALL[tool])
    said = {key for key, value in yaml.safe_load(ALL[tool]).items() if value is not None}
    assert made.tool == tool and said <= {note.key.partition(".")[0] for note in made.notes}
    (tmp_path / "recipe.yaml").write_text(text(made, "config.yaml"))
    ((_, node),) = load_recipe(str(tmp_path / "recipe.yaml")).stages
    assert node.out == f"runs/{'abc'[list(ALL).index(tool)]}" and node.model.name == "owner/model"


def fates(made, fate):
    return {note.key.partition(".")[0] for note in made.notes if note.fate == fate}


def test_axolotl_means_the_same_here(draft):
    made = draft(AXOLOTL)
    assert fates(made, "lost") == {"relora_steps", "a_key_of_tomorrow"}
    data = made.recipe["data"]
    assert data["train"] == [
        {"kind": "jsonl", "path": "rows.jsonl", "columns": {"messages": "talk"}},
        {"kind": "hub", "name": "owner/rows", "subset": "small", "split": "train[:5%]"},
    ]
    assert (data["packing"], data["train_on"], data["overflow"]) == ("first_fit", "all", "drop")
    assert made.recipe["batch"] == {"tokens": 2 * 4 * 512}
    assert made.recipe["quant"] == {"kind": "bnb_nf4"} and made.recipe["adapter"]["rank"] == 8
    assert made.recipe["optim"] == {"kind": "paged_adamw_8bit", "lr": 2e-4, "weight_decay": 0.01}
    assert made.recipe["schedule"] == {"kind": "cosine", "warmup": 10}
    assert made.recipe["evaluate"] == {"per_epoch": 2, "patience": 3}


def test_llama_factory_means_the_same_here(draft):
    made = draft(FACTORY)
    assert fates(made, "lost") == {"template"}
    first, second = made.recipe["data"]["train"]
    assert (
        first["kind"] == "json" and first["columns"] == {"prompt": "ask", "completion": "say"} and first["take"] == 100
    )
    assert second == {"kind": "hub", "name": "owner/rows", "columns": {"messages": "talk"}, "take": 100}
    assert made.recipe["adapter"]["alpha"] == 16, "twice the rank where nothing is said"
    assert made.recipe["adapter"]["targets"] == ["q_proj", "v_proj"]
    assert made.recipe["memory"] == {"recompute": "full"}, "on where nothing is said"
    assert made.recipe["batch"] == {"rows": 8} and made.recipe["data"]["overflow"] == "truncate"


def test_trl_means_the_same_here(draft):
    made = draft(TRL)
    assert fates(made, "lost") == set()
    assert made.files == {"chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    assert made.recipe["data"]["valid"] == [{"kind": "hub", "name": "owner/rows", "subset": "small", "split": "test"}]
    assert made.recipe["schedule"] == {"kind": "cosine", "warmup": 0.1, "floor": 0.1}
    assert made.recipe["loss"] == {"kind": "dft"} and made.recipe["optim"]["clip"] == 0.2
    assert made.recipe["push"] == {"repo": "me/result"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("base_model: m\nrl: dpo\n", "config.yaml:2: rl: dpo makes it a preference or policy stage"),
        ("model_name_or_path: m\nstage: rm\n", "config.yaml:2: stage: rm makes it a reward stage"),
        ("model_name_or_path: m\nbeta: 0.1\n", "config.yaml:2: beta: is a key of preference"),
        ("model_name_or_path: m\nstage: sft\n", "do_train: it does not train"),
        ("something: else\n", "is of no tool that is known"),
        ("[1, 2]", "is no mapping"),
        ("base_model: m\nbase_model: n\n", "is written twice"),
        ("base_model: m\ndatasets: 7\n", "is no configuration of axolotl"),
    ],
)
def test_what_has_no_recipe_is_refused_with_its_line(config, said, draft):
    with pytest.raises(RecipeError, match=said.replace("(", r"\(")):
        draft(config)


def test_their_keys_are_answered_with_ours(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "kind: sft\nmodel: m\nlearning_rate: 1e-4\nadapter: {kind: lora, r: 8}\ndata: {train: []}\nout: x\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    said = str(caught.value)
    assert "r.yaml:3:1: learning_rate: unknown key, which is optim.lr here (axolotl, LLaMA-Factory and TRL)" in said
    assert "adapter.r: unknown key, which is adapter.rank here (peft); fix: write adapter.rank" in said


def test_their_kinds_are_answered_with_ours(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("kind: sft\nmodel: m\nadapter: qlora\noptim: adamw_bnb_8bit\ndata: {train: []}\nout: x\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert "r.yaml:3:10: adapter: qlora is no kind of adapter; fix: write lora, with quant: bnb_nf4" in str(
        caught.value
    )
    assert "fix: write adamw_8bit" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_what_they_are_answered_with_is_a_key(name):
    from llmkit import Preference, Sft
    from llmkit.stages.policy import Policy

    path = NAMES[name][0].split("=")[0].split(" ")[0].rstrip(":,")
    places = [Sft, Policy, Preference]
    for part in () if path == "take" else path.split("."):
        found = [hints(place)[part] for place in places if part in hints(place)]
        assert found, f"{part} of {path}"
        places = [option for hint in found for option in options(hint) if isinstance(option, type)]


BASE = {"axolotl": "base_model: m\n", "llama": "model_name_or_path: m\nstage: sft\ndo_train: true\n"}
BASE["trl"] = "model_name_or_path: m\ndataset_name: a/b\n"


@pytest.mark.parametrize(
    ("tool", "config", "path", "value"),
    [
        ("llama", "finetuning_type: full\nbf16: true", "precision", "bf16_mixed"),
        ("llama", "finetuning_type: full\npure_bf16: true", "precision", "bf16"),
        ("trl", "bf16: true\ntorch_dtype: bfloat16", "precision", "bf16"),
        ("trl", "bf16: true\nuse_peft: true", "precision", "bf16_mixed"),
        ("llama", "", "optim.lr", 5e-5),
        ("trl", "", "optim.lr", 2e-5),
        ("trl", "optim: adafactor\nlearning_rate: 1e-5", "optim.lr", None),
        ("trl", "warmup_steps: 0\nwarmup_ratio: 0.1", "schedule.warmup", 0.1),
        ("trl", "warmup_steps: 7\nwarmup_ratio: 0.1", "schedule.warmup", 7),
        ("trl", "lr_scheduler_type: constant\nwarmup_ratio: 0.1", "schedule.warmup", None),
        ("axolotl", "warmup_ratio: 0.0", "schedule.warmup", 0),
        ("axolotl", "", "schedule.warmup", 0.03),
        ("llama", "finetuning_type: freeze", "adapter.kind", "none"),
        ("trl", "use_peft: true\nlora_target_modules: [all-linear]", "adapter.targets", "all-linear"),
        (
            "trl",
            "lr_scheduler_type: cosine_with_min_lr\nlearning_rate: 1e-4\nlr_scheduler_kwargs: {min_lr: 1e-5}",
            "schedule.floor",
            pytest.approx(0.1),
        ),
        (
            "axolotl",
            "datasets: [{path: json, data_files: x.jsonl}]",
            "data.train",
            [{"kind": "jsonl", "path": "x.jsonl"}],
        ),
    ],
)
def test_what_other_tools_mean_without_saying_it(tool, config, path, value, draft):
    place = draft(BASE[tool] + config + "\n").recipe
    for part in path.split("."):
        place = place.get(part) if place is not None else None
    assert place == value


def test_what_is_frozen_there_is_said_to_be_lost(draft):
    assert "finetuning_type" in fates(draft(BASE["llama"] + "finetuning_type: freeze\n"), "lost")


def test_what_is_no_configuration_is_said_to_be_none(draft, tmp_path):
    with pytest.raises(RecipeError, match="is a recipe of ours already; fix: llmkit run"):
        draft("kind: sft\nmodel: m\n")
