"""A tiny model of a family through its files: quantised, with scaled RoPE, and written again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from llmkit.adapters.node import Lora
from llmkit.build.opening import load
from llmkit.build.support_lora import TOKENS, experts, filled, through
from llmkit.core.errors import ModelError
from llmkit.core.types import Packed, Segment
from llmkit.models.compare import off
from llmkit.models.export import export
from llmkit.models.families import SMALL, tiny
from llmkit.models.load import How, Loaded
from llmkit.models.node import ModelRef, Nf4
from llmkit.models.resolve import resolve
from llmkit.models.rope import GLOBAL, SCALES, Linear, LongRope, RopeScaling, Yarn, head_size, rotations
from llmkit.models.support import YES, said

CLOSE, CHAIN = 1e-5, 1e-4
"""What fp32 leaves of equal sums: logits, gradients."""
FACTOR, TRAINED = 4, int(SMALL["max_position_embeddings"])
SCALED: dict[str, Any] = dict(factor=float(FACTOR), original_max_position_embeddings=TRAINED, replace=True)


PLACES = torch.arange(TOKENS.shape[1])[None]
FAR = PLACES + 3 * TRAINED
"""Positions past the trained length, which the scaled model reaches."""


def write(family: str, folder: Path) -> Path:
    """A model of the family as transformers saves it, with a tokenizer of words that are numbers."""
    tiny(family, 0.1).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(n): n for n in range(64)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2").save_pretrained(folder)
    return folder


def over_nf4(folder: Path, packs: bool) -> str:
    """The column `QLoRA`."""
    try:
        held, plain = opened(folder, How(quant=Nf4())), opened(folder)
        quantised = _dequantised(held.model, plain.model)
        before = {name: parameter.data.clone() for name, parameter in held.model.named_parameters()}
        ours, twin = (Lora(rank=2).attach(loaded.model) for loaded in (held, plain))
    except ModelError as refused:
        return refused.problems[0].what
    name = type(held.model).__name__
    if not quantised:
        return f"{name} has no linear that bitsandbytes quantises"
    for model in (ours, twin):
        filled(model)
    apart, gradients = off(through(ours), through(twin)), _gradients(ours, twin)
    if apart > CLOSE or gradients > CHAIN:
        return f"{name} over NF4 is off from its dequantised weights by {apart:.0e}, in gradients by {gradients:.0e}"
    if not _untouched(ours, held.model, before):
        return f"{name}: a step changes the quantised base"
    if packs and (gap := _packed(ours)) > CLOSE:
        return f"{name} gives packed sequences other values over NF4 (off by {gap:.0e})"
    return YES + _left(held.model)


def opened(folder: Path, how: How = How(), rope: RopeScaling | None = None) -> Loaded:
    """As every verb of llmkit loads it."""
    ref = ModelRef(name=str(folder), rope=rope)
    return load(resolve(ref), ref, how)


def _dequantised(held: Any, plain: Any) -> int:
    """Gives `plain` the weights that `held` computes with; tells how many are quantised."""
    from bitsandbytes.nn import Linear4bit

    found = {name: module for name, module in held.named_modules() if isinstance(module, Linear4bit)}
    with torch.no_grad():
        for name, module in found.items():
            place, weight = plain.get_submodule(name), dequantize_module_weight(module)
            place.weight.copy_(weight.T if isinstance(place, Conv1D) else weight)
    return len(found)


def _gradients(ours: Any, twin: Any) -> float:
    theirs = dict(twin.named_parameters())
    return max(off(p.grad, theirs[n].grad) for n, p in ours.named_parameters() if p.requires_grad)


def _untouched(model: Any, base: Any, before: dict[str, Tensor]) -> bool:
    """Whether a step changes the factors and nothing else, bit for bit."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in trained]
    torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0).step()
    moved = all(not torch.equal(p, old) for p, old in zip(trained, kept, strict=True))
    now = {name.replace(".base_layer.", "."): p.data for name, p in base.named_parameters() if "lora_" not in name}
    return moved and now.keys() == before.keys() and all(torch.equal(now[name], old) for name, old in before.items())


def _packed(model: Any) -> float:
    """How far two packed sequences are from each alone."""
    row = TOKENS[0]
    spans = ((0, 7), (7, 11))
    places = torch.cat([torch.arange(end - start) for start, end in spans])
    context = Packed(tuple(Segment(0, *span) for span in spans))
    with torch.no_grad():
        packed = model(input_ids=row[None], position_ids=places[None], attend=context).logits[0]
        alone = [model(input_ids=row[start:end][None], use_cache=False).logits[0] for start, end in spans]
    return off(packed, torch.cat(alone))


def _left(model: Any) -> str:
    """What is said of experts that are no linears: they stay as they are."""
    return ": the experts are no linears and are not quantised" if experts(model) else ""


def stretched(folder: Path) -> str:
    """The column `RoPE`."""
    nodes: list[RopeScaling] = [Linear(**SCALED), Yarn(**SCALED)]
    found = [_stretched(folder, node) for node in nodes]
    if all(map(said, found)):
        return max(found, key=len)
    if all("does not take RoPE" in reason for reason in found):  # some take the one that they were trained with
        pairs = _turned(folder)
        longrope = LongRope(**SCALED, short_factor=(1.0,) * pairs, long_factor=tuple(1.0 + n for n in range(pairs)))
        last = _stretched(folder, longrope)
        return f"{YES}: with `{longrope.kind}` alone: {found[0]}" if said(last) else found[0]
    return next(reason for reason in found if not said(reason))


def _stretched(folder: Path, node: RopeScaling) -> str:
    """The column for one kind."""
    try:
        model = opened(folder, rope=node).model
    except ModelError as refused:
        return refused.problems[0].what
    name, kind = type(model).__name__, node.kind
    ours = logits(model, FAR)
    far = off(ours, logits(_by_hand(folder, node), FAR))
    if far > CLOSE:
        return f"{name} under RoPE `{kind}` is off by {far:.0e} from transformers' own"
    if off(ours, logits(_by_hand(folder), FAR)) < CHAIN:
        return f"{name} is not changed by RoPE `{kind}`"
    if kind != "linear" or _moves_by(folder, model, FACTOR):
        return YES
    everywhere = _all_global(folder)
    if everywhere is None or not _moves_by(everywhere, opened(everywhere, rope=node).model, FACTOR):
        return f"{name} is told of positions by more than RoPE"
    return f"{YES}: layers with a window turn as before, and the others as asked"


def _moves_by(folder: Path, scaled: Any, factor: int) -> bool:
    """Whether the model under `linear` is, at so many times a position, what it is unscaled at that position."""
    return off(logits(scaled, PLACES * factor), logits(_by_hand(folder), PLACES)) <= CHAIN


def _all_global(folder: Path) -> Path | None:
    """The same weights under a configuration without windows, where there are any."""
    config = json.loads((folder / "config.json").read_text())
    if "sliding_attention" not in (config.get("layer_types") or ()):
        return None
    made = folder.with_name("global")
    shutil.copytree(folder, made, dirs_exist_ok=True)
    config["layer_types"] = [GLOBAL] * len(config["layer_types"])
    (made / "config.json").write_text(json.dumps(config))
    return made


def _turned(folder: Path) -> int:
    """How many pairs of dimensions a head turns."""
    config = AutoConfig.from_pretrained(folder)
    return int(head_size(config) * (rotations(config).get("partial_rotary_factor") or 1.0)) // 2


def _by_hand(folder: Path, node: RopeScaling | None = None) -> Any:
    """What transformers makes of a scaling, or of none, in a configuration that we did not write."""
    config = AutoConfig.from_pretrained(folder)
    own = {key: value for key, value in rotations(config).items() if key not in SCALES}
    given: dict[str, Any] = {**own, "rope_type": "default"}
    if node is not None:
        given |= {"rope_type": node.kind, "factor": float(FACTOR)}
        given |= {"original_max_position_embeddings": TRAINED} if node.kind != "linear" else {}
        factors = {key: list(getattr(node, key, None) or ()) for key in ("short_factor", "long_factor")}
        given |= {key: value for key, value in factors.items() if value}
        config.max_position_embeddings = FACTOR * TRAINED
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = TRAINED
    config.rope_parameters = {**config.rope_parameters, GLOBAL: given} if GLOBAL in config.rope_parameters else given
    return AutoModelForCausalLM.from_pretrained(folder, config=config).eval()


def logits(model: Any, places: Tensor) -> Tensor:
    """Of the tokens at these positions."""
    # without a mask transformers takes positions that do not follow each other for packed sequences
    given = dict(position_ids=places, attention_mask=torch.ones_like(TOKENS))
    with torch.no_grad():
        made: Tensor = model.eval()(input_ids=TOKENS, use_cache=False, **given).logits[0]
    return made


def exported(folder: Path) -> str:
    """The column `export`."""
    out = folder.with_name("exported")
    try:
        loaded = opened(folder)
    except ModelError as refused:
        return refused.problems[0].what
    export(loaded.model, loaded.tokenizer, out, loaded.resolved)
    before, after = (AutoModelForCausalLM.from_pretrained(place).eval() for place in (folder, out))
    name, (old, new) = type(before).__name__, (model.state_dict() for model in (before, after))
    if odd := [key for key in {*old, *new} if key not in old or key not in new or not torch.equal(old[key], new[key])]:
        return f"{name} comes back with another {min(odd)}"
    with torch.no_grad():
        first, second, ours = (m(input_ids=TOKENS, use_cache=False).logits for m in (before, after, loaded.model))
    if not torch.equal(first, second) or off(ours, first) > CLOSE:
        return f"{name} gives other logits when it is read again"
    return YES
