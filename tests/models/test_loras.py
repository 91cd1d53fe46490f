"""Many adapters over one base: what peft says of each alone, whatever is in the same step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llmkit.core.errors import ModelError
from llmkit.core.types import Batch, Paged, Span
from llmkit.models.adapter_files import lacks
from llmkit.models.attend import install
from llmkit.models.decoder import Decoder
from llmkit.models.families import tiny
from llmkit.models.fused import fuse
from llmkit.models.loras import base_of
from llmkit.models.ordered import product
from llmkit.models.paged import BlockStore
from llmkit.models.virtual import hidden as after_virtual

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORAS = {
    "all": LoraConfig(r=4, lora_alpha=8, target_modules=ALL),
    "stable": LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    "patterns": LoraConfig(
        r=4,
        target_modules=["q_proj", "o_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"o_proj": 3},
    ),
}
PROMPTS = {
    "soft": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "encoded": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}


def saved(folder: Path, config: object, family: str = "Llama", dtype: torch.dtype = torch.float32) -> Path:
    """An adapter of peft with weights that do something."""
    model = get_peft_model(tiny(family), config)
    torch.manual_seed(len(str(config)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (torch.randn_like(parameter) * 0.2).to(dtype)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: saved(root / name, config) for name, config in (LORAS | PROMPTS).items()}


def decoder(family: str = "Llama") -> Decoder:
    model = tiny(family).eval()
    install(model, "auto")
    fuse(model)
    return Decoder(model)


def with_bank(folders, family: str = "Llama") -> Decoder:
    made = decoder(family)
    for name, folder in folders.items():
        made.bank.put(name, made.bank.read(folder))
    return made


def by_peft(folder: Path, tokens: torch.Tensor, family: str = "Llama") -> torch.Tensor:
    """The last hidden states of peft's own model, without our attention."""
    model = PeftModel.from_pretrained(tiny(family), str(folder)).eval()
    if model.active_peft_config.is_prompt_learning:
        batch = Batch(tokens[None], torch.arange(len(tokens))[None], tokens, tokens, None, (0,), (len(tokens),))
        return after_virtual(model, model.get_base_model().base_model, batch)[0]
    return model.get_base_model().base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]


@torch.no_grad()
def stepped(made: Decoder, rows: list[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The hidden states of each row's own tokens, all of them in one step."""
    store, spans, tokens, places, at = BlockStore(64, 4), [], [], [], 0
    words = len(made.causal.get_output_embeddings().weight)
    for number, (key, own) in enumerate(rows):
        virtual = made.bank.held[key].virtual if key else 0
        given = torch.cat([torch.arange(words, words + virtual), own])
        spans.append(Span(0, at, at + len(given), 0, tuple(range(number * 8, number * 8 + 8))))
        tokens, places, at = [*tokens, given], [*places, torch.arange(len(given))], at + len(given)
    out = made.hidden(torch.cat(tokens), torch.cat(places), Paged(store, tuple(spans)), [key for key, _ in rows])
    return [out[span.end - len(own) : span.end] for span, (_, own) in zip(spans, rows, strict=True)]


def drawn(*sizes: int) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.randint(3, 60, (n,), generator=source) for n in sizes]


@torch.no_grad()
def test_rows_of_a_mixed_step_are_those_of_peft_and_of_the_base(folders):
    made, base = with_bank(folders), decoder()
    keys = ["all", "", "soft", "stable", "all", "patterns", "encoded", ""]
    rows = list(zip(keys, drawn(3, 5, 7, 17, 2, 4, 9, 1), strict=True))
    plain = stepped(base, [("", own) for _, own in rows])
    for (key, own), out, without in zip(rows, stepped(made, rows), plain, strict=True):
        alone = by_peft(folders[key], own) if key else without
        assert (out - alone).abs().max() <= 1e-5 * alone.abs().max(), key
        assert key == "" or (out - without).abs().max() > 1e-2 * without.abs().max()  # the control: it does something


def test_what_is_added_to_a_row_does_not_depend_on_its_neighbours():
    source = torch.Generator().manual_seed(0)
    x, down, up = (torch.randn(n, m, generator=source) for n, m in ((45, 37), (5, 37), (23, 5)))
    whole = product(product(x, down), up)
    assert torch.allclose(whole, x @ down.T @ up.T, atol=1e-4)
    for rows in ([0], [3, 1], [44, *range(20)], list(range(44, -1, -1))):
        assert torch.equal(product(product(x[rows], down), up), whole[rows])


@pytest.mark.parametrize(("family", "names"), [("Gemma-2", ["all", "soft"]), ("Phi-3", ["fused"])])
@torch.no_grad()
def test_of_other_families(family, names, tmp_path):
    configs = LORAS | PROMPTS | {"fused": LoraConfig(r=4, target_modules=["qkv_proj", "gate_up_proj", "down_proj"])}
    folders = {name: saved(tmp_path / name, configs[name], family) for name in names}
    rows = list(zip([*names, ""], drawn(6, 9, 3)[: len(names) + 1], strict=True))
    for (key, own), out in zip(rows, stepped(with_bank(folders, family), rows), strict=True):
        if key:
            alone = by_peft(folders[key], own, family)
            assert (out - alone).abs().max() <= 1e-5 * alone.abs().max(), key


@torch.no_grad()
def test_over_experts_attention_alone_is_adapted(tmp_path):
    folder = saved(tmp_path / "a", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "Mixtral")
    own = drawn(6)[0]
    out, alone = stepped(with_bank({"a": folder}, "Mixtral"), [("a", own)])[0], by_peft(folder, own, "Mixtral")
    assert (out - alone).abs().max() <= 1e-5 * alone.abs().max()


def changed(folder: Path, to: Path, **settings: object) -> Path:
    shutil.copytree(folder, to)
    said = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(said | settings))
    return to


SETTINGS = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "lora_bias": True,
    "trainable_token_indices": [1],
    "target_parameters": ["experts.down_proj"],
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [1],
    "something_new": {"a": 1},
}


def test_what_only_peft_runs_is_refused_by_its_name(folders, tmp_path):
    bank = decoder().bank
    for key, value in SETTINGS.items():
        folder = changed(folders["all"], tmp_path / key, **{key: value})
        with pytest.raises(ModelError, match=f"uses {key}.*fix: merge it"):
            bank.read(folder)
    for start in ("pissa", "olora", "loftq"):
        with pytest.raises(ModelError, match=f"begins from {start}"):
            bank.read(changed(folders["all"], tmp_path / start, init_lora_weights=start))
    with pytest.raises(ModelError, match="is a ia3, of which one"):
        bank.read(changed(folders["all"], tmp_path / "ia3", peft_type="IA3"))
    assert lacks(changed(folders["all"], tmp_path / "own", lora_dropout=0.5)) == ""  # the control
    assert not bank.held


def altered(folder: Path, to: Path, change) -> Path:
    shutil.copytree(folder, to)
    held = load_file(to / "adapter_model.safetensors")
    change(held)
    save_file(held, to / "adapter_model.safetensors")
    return to


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def test_what_does_not_fit_the_base_is_refused(folders, tmp_path):
    bank, some = decoder().bank, folders["all"]
    cases = {
        "lacks lora_B of model.layers.0.self_attn.q_proj": lambda t: t.pop(f"{Q}B.weight"),
        "has shape \\[2, 32\\]; its settings and the base make it \\[4, 32\\]": lambda t: t.update(
            {f"{Q}A.weight": torch.ones(2, 32)}
        ),
        "has odd, which is no part of a LoRA": lambda t: t.update({"odd": torch.ones(1)}),
        "is on model.layers.7.x, which is no linear": lambda t: t.update(
            {f"base_model.model.model.layers.7.x.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
        ),
        "is on lm_head, and is not run": lambda t: t.update(
            {f"base_model.model.lm_head.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
        ),
        "holds NaN": lambda t: t[f"{Q}A.weight"].fill_(float("nan")),
        "lacks lora_A of model.layers.0.self_attn.q_proj": lambda t: [t.pop(f"{Q}{x}.weight") for x in "AB"],
    }
    for number, (what, change) in enumerate(cases.items()):
        with pytest.raises(ModelError, match=what):
            bank.read(altered(some, tmp_path / str(number), change))
    with pytest.raises(ModelError, match="settings and the base make it"):
        bank.read(changed(some, tmp_path / "rank", r=8))
    with pytest.raises(ModelError, match=r"is to hold prompt_embeddings of shape \[6, 32\]"):
        bank.read(changed(folders["soft"], tmp_path / "six", num_virtual_tokens=6))
    with pytest.raises(ModelError, match="has a rank for"):
        bank.read(changed(some, tmp_path / "regex", rank_pattern={"(a+)+$": 4}))
    (tmp_path / "link").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "link" / name).symlink_to(some / name)
    with pytest.raises(ModelError, match="leads out of the folder"):
        bank.read(tmp_path / "link")


def test_an_adapter_of_ours_knows_its_base(folders, tmp_path):
    model = decoder().model
    bank = Decoder(model, base_of(model, "a" * 64, {"kind": "linear"})).bank
    for said, what in (
        ({"base": {"sha256": "b" * 64}, "rope": {"kind": "linear"}}, "was trained on weights bbbbbbbbbbbb"),
        ({"base": {"sha256": "a" * 64}}, "was trained with rope None"),
    ):
        folder = tmp_path / what.split()[-1]
        shutil.copytree(folders["all"], folder)
        (folder / "llmkit.json").write_text(json.dumps(said))
        with pytest.raises(ModelError, match=what):
            bank.read(folder)
        (folder / "llmkit.json").write_text(json.dumps({"base": {"sha256": "a" * 64}, "rope": {"kind": "linear"}}))
        bank.read(folder)  # the control


@torch.no_grad()
def test_other_weights_in_the_place_of_the_old_ones(folders):
    made, own = with_bank({"a": folders["all"]}), drawn(5)[0]
    tensors = load_file(folders["all"] / "adapter_model.safetensors")
    made.bank.put("b", made.bank.made("a", {name: 2 * t if ".lora_B" in name else t for name, t in tensors.items()}))
    made.bank.put("c", made.bank.made("a", tensors))
    first, second, third = stepped(made, [("a", own), ("b", own), ("c", own)])
    assert torch.equal(first, third) and not torch.allclose(first, second, rtol=1e-2)
    with pytest.raises(ModelError, match="other modules than the old ones"):
        made.bank.made("a", {name: t for name, t in tensors.items() if ".layers.0." in name})
    with pytest.raises(ModelError, match="make it"):
        made.bank.made("a", {name: t[:1] for name, t in tensors.items()})


def test_a_family_that_reads_its_tokens_elsewhere_takes_no_learned_embeddings(folders):
    with pytest.raises(ModelError, match="takes no embeddings in the place of tokens"):
        decoder("Gemma-3n").bank.read(folders["soft"])


def test_embeddings_are_tried_in_the_model_s_own_numbers(folders):
    """Of several ranks one reads an adapter outside of autocast, the others in it: their sums must be of one kind."""
    made, mixed = decoder(), []
    made.causal.base_model.norm.register_forward_hook(lambda *_: mixed.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made.bank.read(folders["soft"])
        assert torch.is_autocast_enabled("cpu")
    assert mixed == [False, False]  # tokens, and their embeddings
