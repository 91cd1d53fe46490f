"""Configurations of TRL's command line, and those of alignment-handbook's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.core.errors import RecipeError
from llmkit.recipe.foreign import arguments as shared
from llmkit.recipe.foreign.draft import Draft
from llmkit.recipe.foreign.sources import source

PREFERENCE = ("beta", "max_prompt_length", "num_generations", "desirable_weight", "reward_funcs", "reward_model_path")
NEEDLESS = {
    "dataset_kwargs": "rows are tokenised as the template writes them",
    "torch_dtype": "precision says how weights are held",
    "dtype": "precision says how weights are held",
    "lora_task_type": "follows from the stage",
    "packing_strategy": "rows are packed first-fit within a step",
    "padding_free": "packed rows have no padding",
    "eval_packing": "evaluation packs what it can",
    "bnb_4bit_quant_type": "is NF4",
    "use_peft": "adapter says so",
    "dataset_test_split": "nothing evaluates",
    "pad_token": "padding is never trained",
}
LOST = {
    "eos_token": "the end of a turn is read from the chat template",
    "loss_type": "loss takes cross_entropy and dft",
    "use_cache": "is not used in training",
    "chat_template_path": "give model.template",
}


def convert(draft: Draft) -> None:
    """Turns the whole of it, as a configuration of SFT.

    Raises:
        RecipeError: it is one of preferences or of reinforcement, which have no stage yet.
    """
    for key in PREFERENCE:
        if draft.get(key) is not None:
            what = "is a key of preference or reinforcement stages, which are not available yet in this version"
            raise RecipeError(what, fix="import a configuration of SFT", key=key, line=draft.lines[key])
    draft.put("kind", "sft")
    draft.rename({"model_name_or_path": "model.name", "output_dir": "out"})
    draft.rename({"seed": "seed", "neftune_noise_alpha": "neftune"})
    if draft.get("model_revision") not in (None, "main"):
        draft.put("model.revision", draft.get("model_revision"), "model_revision")
    draft.needless({"model_revision": "is the newest"})
    shared.attention(draft, "attn_implementation")
    shared.template(draft, "chat_template", "chat_template.jinja")
    _adapter(draft)
    _data(draft)
    size = int(draft.recipe["data"]["max_length"])
    packed = size if draft.recipe["data"]["packing"] != "none" else 0
    shared.batch(draft, "per_device_train_batch_size", 8, packed)
    shared.length(draft, "num_train_epochs", 3)
    shared.optimizer(draft, "optim", 2e-5)
    shared.schedule(draft, "lr_scheduler_type", "linear")
    full = draft.recipe["adapter"]["kind"] == "none"
    shared.precision(draft, draft.get("torch_dtype", draft.get("dtype")), full)
    if draft.get("gradient_checkpointing") is not None:
        on = draft.get("gradient_checkpointing") is True
        draft.put("memory.recompute", "full" if on else "none", "gradient_checkpointing")
    if draft.get("activation_offloading") is True:
        draft.put("memory.offload_activations", True, "activation_offloading")
    if draft.get("loss_type") in ("nll", "chunked_nll"):
        draft.put("loss.kind", "cross_entropy", "loss_type")
    elif draft.get("loss_type") == "dft":
        draft.put("loss.kind", "dft", "loss_type")
    draft.rename({"label_smoothing_factor": "loss.label_smoothing"})
    shared.saving(draft)
    if not draft.recipe["data"].get("valid") and not draft.recipe["data"].get("held_out"):
        draft.recipe.pop("evaluate", None)
    shared.loggers(draft, "project", "run_name")
    shared.hub(draft)
    draft.needless({**NEEDLESS, **shared.NEEDLESS})
    draft.lost({**LOST, **shared.LOST})


def _adapter(draft: Draft) -> None:
    if draft.get("use_peft") is not True:
        draft.put("adapter.kind", "none")
        idle = {
            key: "nothing but use_peft reads it"
            for key in draft.said
            if key.startswith(("lora_", "use_dora", "use_rs"))
        }
        draft.needless(idle)
        shared.quantised(draft)
        return
    draft.put("adapter.kind", "lora", "use_peft")
    defaults = {"lora_r": ("rank", 16), "lora_alpha": ("alpha", 32), "lora_dropout": ("dropout", 0.05)}
    for theirs, (ours, value) in defaults.items():
        draft.put(f"adapter.{ours}", draft.get(theirs, value), *draft.given(theirs))
    targets = draft.get("lora_target_modules")
    if targets:
        alone = targets == ["all-linear"]  # a list of one word there
        draft.put("adapter.targets", "all-linear" if alone else targets, "lora_target_modules")
    else:
        draft.tell(
            "lost", "lora_target_modules", "peft's defaults differ by family; adapter.targets is all-linear here"
        )
    names = {"use_dora": "dora", "use_rslora": "rslora", "lora_modules_to_save": "modules_to_save"}
    draft.rename({theirs: f"adapter.{ours}" for theirs, ours in names.items()})
    draft.rename({"lora_target_parameters": "adapter.parameters"})
    shared.quantised(draft)


def _data(draft: Draft) -> None:
    mixture = draft.get("dataset_mixture")
    if isinstance(mixture, Mapping):
        _mixture(draft, "dataset_mixture", mixture)
    elif draft.get("datasets"):
        _mixture(
            draft, "datasets", {"datasets": draft.get("datasets"), "test_split_size": draft.get("test_split_size")}
        )
        draft.needless({"test_split_size": "is data.held_out"})
    elif isinstance(draft.get("dataset_mixer"), Mapping):
        _mixer(draft)
    else:
        _single(draft)
    key = next((key for key in ("max_length", "max_seq_length") if draft.get(key) is not None), "")
    draft.put("data.max_length", draft.get(key, 1024) if key else 1024, *([key] if key else []))
    draft.put("data.overflow", "truncate")
    packs = draft.get("packing") is True
    draft.put("data.packing", "first_fit" if packs else "none", *draft.given("packing"))
    _trained(draft)
    draft.rename({"dataset_streaming": "data.streaming"})


def _trained(draft: Draft) -> None:
    """What is trained: of rows of messages all of it, unless something else is asked."""
    for key in ("assistant_only_loss", "completion_only_loss"):
        if draft.get(key) is True:
            draft.put("data.train_on", "assistant", key)
            return
    why = "data.train_on: all, as for messages and text; prompt + completion rows would train completions alone"
    said = [key for key in ("assistant_only_loss", "completion_only_loss") if draft.get(key) is not None]
    draft.put("data.train_on", "all", *said, changed=why)
    if not said:
        draft.tell("changed", "assistant_only_loss", why)


def _columns(names: Any) -> dict[str, Any]:
    """A list of columns that are kept: they have our names already."""
    return {"columns": dict(names)} if isinstance(names, Mapping) and names else {}


def _mixture(draft: Draft, key: str, mixture: Mapping[str, Any]) -> None:
    rows = []
    for row in mixture.get("datasets") or []:
        name = str(row.get("id") or row.get("path"))
        made = source(name, row.get("config") or row.get("name"), row.get("split"), None, row.get("data_files"))
        made |= _columns(row.get("columns"))
        if row.get("weight") not in (None, 1, 1.0):
            draft.tell("lost", f"{key}.weight", f"a share of {row['weight']} of {name} is taken there: give take: N")
        rows.append(made)
    draft.put("data.train", rows, key)
    size = mixture.get("test_split_size")
    if size:
        shared.held_out(draft, f"{key}.test_split_size", size)


def _mixer(draft: Draft) -> None:
    splits = [name for name in draft.get("dataset_splits", ["train"]) if not str(name).startswith("test")]
    rows = [source(name, None, split) for name in draft.get("dataset_mixer") for split in splits]
    draft.put("data.train", rows, "dataset_mixer", *(["dataset_splits"] if draft.get("dataset_splits") else []))
    if any(share not in (1, 1.0) for share in draft.get("dataset_mixer").values()):
        draft.tell("lost", "dataset_mixer", "a share of each is taken there: give take: N")


def _single(draft: Draft) -> None:
    name = str(draft.get("dataset_name"))
    made = source(name, draft.get("dataset_config"), draft.get("dataset_train_split"))
    field = draft.get("dataset_text_field")
    if field not in (None, "text"):
        made["columns"] = {"text": field}
    told = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_text_field")
    draft.put("data.train", [made], *(key for key in told if draft.get(key) is not None))
    evaluates = str(draft.get("eval_strategy", "no")).lower() != "no"
    if evaluates:
        split = draft.get("dataset_test_split", "test")
        keys = ["dataset_test_split"] if draft.get("dataset_test_split") else []
        draft.put("data.valid", [{**made, "split": split}], *keys)
