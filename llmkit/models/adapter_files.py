"""Adapters in peft's format that can be run beside others over one base: read by our own readers, and checked.

LoRA (arXiv:2106.09685; rank-stabilised: arXiv:2312.03732) and learned embeddings before the prompt (prompt tuning,
arXiv:2104.08691; P-tuning, arXiv:2103.10385). What peft can do beyond these is refused by the name of its setting.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.core.errors import ModelError
from llmkit.models import safe

FIX = "merge it into its base, or serve it as the model"
"""For what peft alone can run."""
READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"}
"""Settings of a LoRA that are looked at here."""
IDLE = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "megatron_core", "megatron_config", "eva_config", "qalora_group_size"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("ensure_weight_tying", "runtime_config"),
}
"""Settings that say nothing of how it is run: where its tensors lie says what it is on."""
STARTS = (None, True, False, "gaussian", "eva")
"""First weights that leave the base as it is."""
PROMPTS = ("PROMPT_TUNING", "P_TUNING")
TABLE = "prompt_embeddings"
"""The tensor of learned embeddings."""
ROOM = 1 << 16
"""Virtual tokens that any model would hold."""


@dataclass(frozen=True)
class Factors:
    """What is added to a linear: scale * up down x."""

    down: Tensor
    """(rank, in), fp32."""
    up: Tensor
    """(out, rank), fp32."""
    scale: float


@dataclass(frozen=True)
class Settings:
    """The ranks and scales of a LoRA."""

    rank: int
    alpha: float
    stable: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def rank_of(self, name: str) -> int:
        """Of a module."""
        return self.ranks.get(_pattern(self.ranks, name), self.rank)

    def scale_of(self, name: str) -> float:
        """Of a module: alpha / rank, or alpha / sqrt(rank)."""
        rank = self.rank_of(name)
        return self.alphas.get(_pattern(self.alphas, name), self.alpha) / (rank**0.5 if self.stable else rank)


@dataclass(frozen=True)
class Lora:
    """A LoRA on linears of the base, by their names in it."""

    factors: Mapping[str, Factors]
    mark: str
    """The digest of its weights."""
    settings: Settings
    virtual: int = 0


@dataclass(frozen=True)
class Prompt:
    """Learned embeddings before the prompt."""

    table: Tensor
    """(n, hidden)."""
    mark: str

    @property
    def virtual(self) -> int:
        """n."""
        return len(self.table)


@dataclass(frozen=True)
class Base:
    """The model that adapters are for."""

    linears: Mapping[str, tuple[int, int]]
    """Name -> inputs and outputs."""
    hidden: int
    words: int
    """Rows of the vocabulary; tokens past them are virtual."""
    sha256: str = ""
    """Of its weights; an adapter that says which it was trained on must say these."""
    rope: Any = None
    """How it is scaled, as an adapter of ours tells it."""
    others: frozenset[str] = field(default_factory=frozenset)
    """Modules that no adapter is run on here: the embeddings and the head."""


def lacks(folder: Path) -> str:
    """Why the adapter of a folder cannot be run beside others; nothing if it can. Looks at its settings alone.

    Raises:
        ModelError: they cannot be read.
    """
    said = _settings(folder)
    kind = str(said.get("peft_type"))
    if kind in PROMPTS:
        return "uses modules_to_save" if said.get("modules_to_save") else ""
    if kind != "LORA":
        return f"is a {kind.lower()}, of which one at a time is run"
    odd = [key for key in sorted(said) if key not in READ | IDLE and said[key]]
    if said.get("bias", "none") != "none":
        odd.append("bias")
    if odd:
        return f"uses {odd[0]}"
    start = said.get("init_lora_weights")
    return "" if start in STARTS else f"begins from {start}, which changes the base"


def read(folder: Path, base: Base) -> Lora | Prompt:
    """The adapter of a folder.

    Raises:
        ModelError: it cannot be run beside others, is not sound, or does not fit the base; nothing is kept then.
    """
    if why := lacks(folder):
        raise ModelError(f"{why}, and cannot be run beside other adapters", fix=FIX, file=str(folder))
    _check_origin(folder, base)
    tensors = _tensors(folder)
    mark, said = safe.digest(folder, "adapter_model"), _settings(folder)
    if said["peft_type"] in PROMPTS:
        return Prompt(_table(tensors, said, base, folder), mark)
    settings = _ranks(said, folder)
    made = Lora(paired(tensors, settings, base, str(folder)), mark, settings)
    _check_targets(said, made.factors, base, folder)
    return made


def renewed(old: Lora | Prompt, tensors: Mapping[str, Tensor], base: Base, mark: str) -> Lora | Prompt:
    """An adapter with other weights, by the names that peft saves them under.

    Raises:
        ModelError: they are of other shapes or names than the old ones.
    """
    held = {name: _sound(tensor.detach().to("cpu"), name, "the new weights") for name, tensor in tensors.items()}
    if isinstance(old, Prompt):
        if {name: t.shape for name, t in held.items()} != {TABLE: old.table.shape}:
            raise _unfit(f"new weights are to be {TABLE} of shape {list(old.table.shape)}", "")
        return Prompt(held[TABLE], mark)
    made = paired(held, old.settings, base, "")
    if made.keys() != old.factors.keys():
        raise _unfit(f"new weights have other modules than the old ones ({_one(made.keys() ^ old.factors.keys())})", "")
    return replace(old, factors=made, mark=mark)


def paired(tensors: Mapping[str, Tensor], settings: Settings, base: Base, file: str) -> dict[str, Factors]:
    """The factors of each linear.

    Raises:
        ModelError: a name, a rank or a shape does not fit.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if part is None:
            raise _unfit(f"has {name}, which is no part of a LoRA on linears", file)
        found.setdefault(part[1], {})[part[2]] = tensor
    if not found:
        raise _unfit("holds no tensors", file)
    return {name: _pair(name, parts, settings, base, file) for name, parts in sorted(found.items())}


def _pair(name: str, parts: Mapping[str, Tensor], settings: Settings, base: Base, file: str) -> Factors:
    if name in base.others:
        raise ModelError(f"is on {name}, and is not run beside other adapters there", fix=FIX, file=file)
    if name not in base.linears:
        raise _unfit(f"is on {name}, which is no linear of the base", file)
    if len(parts) != 2:
        raise _unfit(f"lacks lora_{'B' if 'A' in parts else 'A'} of {name}", file)
    (inputs, outputs), rank = base.linears[name], settings.rank_of(name)
    for letter, want in (("A", [rank, inputs]), ("B", [outputs, rank])):
        if list(parts[letter].shape) != want:
            here = f"lora_{letter} of {name} has shape {list(parts[letter].shape)}"
            raise _unfit(f"{here}; its settings and the base make it {want}", file)
    return Factors(parts["A"].contiguous(), parts["B"].contiguous(), settings.scale_of(name))


def _check_targets(said: Mapping[str, Any], factors: Mapping[str, Any], base: Base, folder: Path) -> None:
    """Of a list of endings, each linear that it means has factors."""
    targets = said.get("target_modules")
    if not isinstance(targets, list) or said.get("exclude_modules") or said.get("layers_to_transform") is not None:
        return
    meant = [n for n in base.linears if any(n == t or n.endswith(f".{t}") for t in map(str, targets))]
    if absent := [name for name in meant if name not in factors]:
        raise _unfit(f"lacks lora_A of {_one(absent)}", str(folder))


def _check_origin(folder: Path, base: Base) -> None:
    """An adapter that llmkit trained knows its base."""
    if not (folder / "llmkit.json").is_file():
        return
    said = safe.read_json(folder / "llmkit.json")
    known = said.get("base")
    trained = str(known.get("sha256") or "") if isinstance(known, dict) else ""
    if trained and base.sha256 and trained != base.sha256:
        raise _unfit(f"was trained on weights {trained[:12]}..., the base is {base.sha256[:12]}...", str(folder))
    if said.get("rope") != base.rope:
        what = f"was trained with rope {said.get('rope')}, and the base runs with {base.rope}"
        raise ModelError(what, fix="serve its base with that rope", file=str(folder))


def _settings(folder: Path) -> dict[str, Any]:
    return safe.read_json(safe.inside(folder, "adapter_config.json"))


def _ranks(said: Mapping[str, Any], folder: Path) -> Settings:
    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9

    rank, alpha = said.get("r", 8), said.get("lora_alpha", 8)
    ranks, alphas = said.get("rank_pattern") or {}, said.get("alpha_pattern") or {}
    maps = all(isinstance(m, dict) and all(map(number, m.values())) for m in (ranks, alphas))
    if not (number(rank) and number(alpha) and maps):
        raise _unfit("has settings of rank and alpha that are no numbers", str(folder))
    if odd := [key for key in (*ranks, *alphas) if not re.fullmatch(r"\^?[\w.]+", key)]:
        raise ModelError(f"has a rank for {odd[0][:80]}, which is no name", fix=FIX, file=str(folder))
    return Settings(int(rank), float(alpha), bool(said.get("use_rslora")), ranks, alphas)


def _pattern(patterns: Mapping[str, Any], name: str) -> str:
    """The first that means a module, as peft reads them: its name, or an ending of it."""
    for key in patterns:
        if name == key.lstrip("^") or (key[0] != "^" and name.endswith(f".{key}")):
            return key
    return ""


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    made: dict[str, Tensor] = {}
    for file, header in safe.check_folder(folder, "adapter_model").items():
        with safe_open(folder / file, "pt") as held:
            for name in header:
                made[name] = _sound(held.get_tensor(name), name, str(folder / file))
    return made


def _sound(tensor: Tensor, name: str, file: str) -> Tensor:
    if not tensor.is_floating_point():
        raise _unfit(f"{name} holds {str(tensor.dtype).removeprefix('torch.')}", file)
    if not torch.isfinite(tensor.float()).all():
        raise ModelError(f"{name} holds NaN or infinity", fix="use sound weights", file=file)
    return tensor.float()


def _table(tensors: Mapping[str, Tensor], said: Mapping[str, Any], base: Base, folder: Path) -> Tensor:
    count = said.get("num_virtual_tokens")
    want = {TABLE: [count, base.hidden]}
    if not isinstance(count, int) or not 0 < count < ROOM or {n: list(t.shape) for n, t in tensors.items()} != want:
        what = f"is to hold {TABLE} of shape [{count}, {base.hidden}] and nothing else"
        raise _unfit(what, str(folder))
    return tensors[TABLE]


def _one(names: Any) -> str:
    some: Sequence[str] = sorted(names)
    return some[0] + (f" and {len(some) - 1} more" if len(some) > 1 else "")


def _unfit(what: str, file: str) -> ModelError:
    return ModelError(what, fix="give the base that it was made for", file=file)
