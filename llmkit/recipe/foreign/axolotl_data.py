"""axolotl's data sets: where rows come from, and what of them is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.recipe.foreign import arguments as shared
from llmkit.recipe.foreign.draft import Draft
from llmkit.recipe.foreign.sources import source

ALPACA = ("alpaca", "alpaca_chat", "alpaca:chat")
SEEN = {"path", "type", "name", "split", "data_files", "ds_type", "revision", "field", "shards", "conversation"}
CHAT = {"field_messages", "message_property_mappings", "roles_to_train", "train_on_eos", "chat_template", "roles"}
TEMPLATES = {"chatml": "chatml", "llama3": "llama3", "gemma": "gemma", "phi_3": "phi3", "alpaca": "alpaca"}
PRETRAINED = {"excess_length_strategy": "documents are cut to chunks"}
NO_TYPE = "its rows are put into text of axolotl's own: write them as messages, or as prompt + completion"


def data(draft: Draft) -> None:
    """`data` of the recipe."""
    key = "pretraining_dataset" if draft.get("pretraining_dataset") else "datasets"
    given = draft.get(key, [])
    rows = [{"path": given}] if isinstance(given, str) else given
    draft.put("data.train", [_source(draft, key, i, row) for i, row in enumerate(rows)], key)
    if tests := draft.get("test_datasets"):
        draft.put(
            "data.valid", [_source(draft, "test_datasets", i, row) for i, row in enumerate(tests)], "test_datasets"
        )
    shared.held_out(draft, "val_set_size", draft.get("val_set_size"))
    draft.rename({"sequence_len": "data.max_length", "default_system_message": "data.system"})
    if key == "pretraining_dataset":
        told = "all documents are read and tokenised before training; axolotl streams them"
        draft.tell("changed", key, told)
        draft.needless({"train_on_inputs": "every token of a document is trained", **PRETRAINED})
    elif draft.get("train_on_inputs") is not None:
        draft.put("data.train_on", "all" if draft.get("train_on_inputs") else "assistant", "train_on_inputs")
    _packing(draft)
    _template(draft, rows)
    if draft.get("group_by_length") is True:
        draft.put("data.length_buckets", 8, "group_by_length", changed="data.length_buckets: rows of like length meet")
    if draft.get("dataset_exact_deduplication") is True:
        draft.put("data.dedup.kind", "exact", "dataset_exact_deduplication")
    draft.lost({"curriculum_sampling": "rows are shuffled by the seed", "shuffle_merged_datasets": "rows are shuffled"})


def _packing(draft: Draft) -> None:
    packs = draft.get("sample_packing")
    draft.put("data.packing", "first_fit" if packs is True else "none", *draft.given("sample_packing"))
    ways = {"drop": "drop", "truncate": "truncate", "raise": "error"}
    said = draft.get("excess_length_strategy", "drop")
    keys = ["excess_length_strategy"] if draft.get("excess_length_strategy") else []
    if not draft.get("pretraining_dataset"):
        draft.put("data.overflow", ways.get(str(said), "drop"), *keys)


def _template(draft: Draft, rows: list[Any]) -> None:
    """Which template: axolotl has names of its own for templates that models bring themselves."""
    kinds = {str(row.get("type")) for row in rows if isinstance(row, Mapping)}
    name = draft.get("chat_template")
    if name == "jinja" and draft.get("chat_template_jinja"):
        draft.files["chat_template.jinja"] = draft.get("chat_template_jinja")
        draft.put("model.template", "chat_template.jinja", "chat_template", "chat_template_jinja")
    elif name in TEMPLATES:
        draft.put("model.template", TEMPLATES[name], "chat_template")
    elif name in ("tokenizer_default", None):
        draft.needless({"chat_template": "the tokenizer's own is used"})
    else:
        draft.tell("lost", "chat_template", "the tokenizer's own is used; give another as a file: model.template")
    if kinds and kinds <= set(ALPACA) and name is None:
        draft.put("model.template", "alpaca")
    elif kinds & set(ALPACA) and name is None:
        draft.tell("changed", "datasets.type", "alpaca rows go through the chat template, as all others do")


def _source(draft: Draft, key: str, index: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        draft.tell("lost", f"{key}.{index}", "is no mapping")
        return source(str(row))
    made = source(str(row.get("path")), row.get("name"), row.get("split"), row.get("revision"), row.get("data_files"))
    made |= _columns(draft, f"{key}.{index}", row)
    if odd := sorted(set(row) - SEEN - CHAT - set(COLUMN_KEYS)):
        draft.tell("lost", f"{key}.{index}", f"{', '.join(odd)}: no counterpart")
    if row.get("shards"):
        draft.tell("lost", f"{key}.{index}.shards", "give split: train[:5%], or take: N")
    return made


COLUMN_KEYS = {
    "field_human": "",
    "field_model": "",
    "field_chosen": "",
    "field_rejected": "",
    "field_thinking": "",
    "template_thinking_key": "",
    "field_tools": "tools",
}


def _columns(draft: Draft, place: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row's type; a type that has no row format of ours is lost."""
    kind = row.get("type")
    if kind == "completion":
        return _columned({"text": row.get("field")}, {"text": ("text",)})
    if kind == "chat_template":
        _chat(draft, place, row)
    if kind in (*ALPACA, "sharegpt", "pretrain", "chat_template", None):
        return _columned({"messages": row.get("field_messages")}, {"messages": ("conversations", "messages")})
    if isinstance(kind, Mapping) and not set(kind) - {"field_instruction", "field_output", "format", "no_input_format"}:
        plain = kind.get("format", "{instruction}") in ("{instruction}", "[INST] {instruction} [/INST]")
        if not plain or "[INST]" in str(kind.get("format")):
            draft.tell("lost", f"{place}.type.format", "text around the prompt is the chat template's: model.template")
        return _columned({"prompt": kind.get("field_instruction"), "completion": kind.get("field_output")}, {})
    draft.tell("lost", f"{place}.type", f"{kind if isinstance(kind, str) else 'a type of your own'}: {NO_TYPE}")
    return {}


def _columned(asked: Mapping[str, Any], known: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    columns = {ours: theirs for ours, theirs in asked.items() if theirs and theirs not in known.get(ours, ())}
    return {"columns": columns} if columns else {}


def _chat(draft: Draft, place: str, row: Mapping[str, Any]) -> None:
    names = dict(row.get("message_property_mappings") or {})
    if names and names not in ({"role": "from", "content": "value"}, {"role": "role", "content": "content"}):
        draft.tell("lost", f"{place}.message_property_mappings", "turns are role + content, or from + value")
    trained = row.get("roles_to_train")
    if trained not in (None, ["assistant"], ["gpt", "assistant"], ["assistant", "gpt"]):
        draft.tell("lost", f"{place}.roles_to_train", "give data.train_on: [roles]")
    if row.get("train_on_eos") not in (None, "turn", "all"):
        draft.tell("lost", f"{place}.train_on_eos", "the end of each trained turn is trained")
