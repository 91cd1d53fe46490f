"""A draft head's folder: `draft.json` says what it is and for which weights, `model.safetensors` holds it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from llmkit.core.errors import ModelError
from llmkit.core.files import DISK, published
from llmkit.models import drafts, safe
from llmkit.models.draft_head import DraftHead, HeadShape
from llmkit.models.drafts import Target

KEY = "speculation.path"


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
    file = safe.check_folder(folder)  # its header is sound
    try:
        shape = HeadShape(**{**said, "taps": tuple(said.get("taps", ()))})
        head = DraftHead(shape, embedding)
        head.load_state_dict(load_file(folder / next(iter(file))))
    except (TypeError, ValueError, RuntimeError, SafetensorError) as cause:
        what = f"the settings and the weights are not those of one head: {str(cause).splitlines()[0]}"
        raise ModelError(what, fix=drafts.AGAIN, file=str(folder), key=key) from cause
    words, wide = embedding.weight.shape
    if wide != shape.embedded or int(head.ids.max()) >= words or int(head.ids.min()) < 0:
        what = f"is over embeddings {shape.embedded} wide and words up to {int(head.ids.max())}, not {wide} and {words}"
        raise ModelError(what, fix=drafts.AGAIN, file=str(folder), key=key)
    return head
