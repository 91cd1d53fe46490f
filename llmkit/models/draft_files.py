"""A draft head's folder: `draft.json` says what it is and for which weights, `model.safetensors` holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from llmkit.core.errors import ModelError
from llmkit.core.files import DISK, published
from llmkit.models import drafts, safe
from llmkit.models.draft_head import DraftHead, HeadShape
from llmkit.models.drafts import Target

KEY = "speculation.path"
MOST = 1 << 31
"""Of any size of a head: no model has a larger one."""


def save_head(head: DraftHead, folder: Path, target: Target) -> None:
    """Writes a head for the model that `target` identifies, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    with published(folder) as aside:
        DISK.write(aside / "model.safetensors", [save(tensors, {"format": "pt"})])
        drafts.write(aside, "head", asdict(head.shape), target)


def load_head(folder: Path, embedding: Any, key: str = KEY) -> DraftHead:
    """The head of a folder over a model's embeddings, in fp32 on the host; for which model it was made is not asked.

    Raises:
        ModelError: the folder holds no head, or one of other sizes than it says or the model has.
    """
    said = dict(drafts.read(folder, "head", key).settings)
    with drafts.remade(key):
        files = safe.check_folder(folder)  # headers are sound
    held = {name: item["shape"] for header in files.values() for name, item in header.items()}
    try:
        shape = HeadShape(**{**said, "taps": tuple(said.get("taps", ()))})
        if why := _unlike(shape, held):
            raise ValueError(why)
        head = DraftHead(shape, embedding)
        head.load_state_dict({k: v for name in files for k, v in load_file(folder / name).items()})
    except (TypeError, ValueError, RuntimeError, OverflowError, SafetensorError) as cause:
        what = f"the settings and the weights are not those of one head: {str(cause).splitlines()[0]}"
        raise ModelError(what, fix="run kind: draft again", file=str(folder), key=key) from cause
    words, wide = embedding.weight.shape
    if wide != shape.embedded or int(head.ids.max()) >= words or int(head.ids.min()) < 0:
        what = f"is over embeddings {shape.embedded} wide and words up to {int(head.ids.max())}, not {wide} and {words}"
        raise ModelError(what, fix=drafts.AGAIN, file=str(folder), key=key)
    return head


def _unlike(shape: HeadShape, held: Mapping[str, Any]) -> str:
    """How the sizes in `draft.json` are not those of the tensors in the files, if they are not; makes nothing."""
    sizes = {name: value for name, value in asdict(shape).items() if name not in ("taps", "theta", "eps")}
    sizes |= {f"taps.{at}": tap for at, tap in enumerate(shape.taps)}
    wrong = [name for name, value in sizes.items() if type(value) is not int or not 0 < value < MOST]
    wrong += [name for name in ("theta", "eps") if not isinstance(getattr(shape, name), int | float)]
    if wrong:
        return f"draft.json says {wrong[0]}: {(sizes | asdict(shape))[wrong[0]]!r:.40}"
    if shape.heads % shape.kv_heads:
        return f"draft.json says {shape.heads} heads, and kv_heads: {shape.kv_heads}"
    with torch.device("meta"):
        asked = {name: list(tensor.shape) for name, tensor in DraftHead(shape, nn.Identity()).state_dict().items()}
    odd = next((name for name in sorted({*asked, *held}) if asked.get(name) != held.get(name)), None)
    return "" if odd is None else f"{odd} is {held.get(odd, 'not there')}, and draft.json asks for {asked.get(odd)}"
