"""A draft head's folder: `draft.json` says what it is and for which weights, `model.safetensors` holds it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from llmkit.core.errors import ModelError
from llmkit.core.files import DISK, publish, write_json
from llmkit.models import safe
from llmkit.models.draft_head import DraftHead, HeadShape

VERSION = 1
AGAIN = "make the head again with kind: draft"


def save_head(head: DraftHead, folder: Path, target: Any) -> None:
    """Writes a head for the model of identity `target`, whole or not at all."""
    aside = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    DISK.write(aside / "model.safetensors", [save(tensors, {"format": "pt"})])
    settings = asdict(head.shape)
    write_json(aside / "draft.json", {"version": VERSION, "kind": "head", "settings": settings, "target": target})
    publish(aside, folder)


def read_draft(folder: Path) -> Mapping[str, Any]:
    """What `draft.json` says.

    Raises:
        ModelError: there is none, it is of another version, or of no head.
    """
    path = folder / "draft.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no draft.json", fix="give the model/ of a run of kind: draft", key="path")
    said: Mapping[str, Any] = safe.read_json(path)
    if said.get("version") != VERSION or said.get("kind") != "head" or not isinstance(said.get("settings"), dict):
        what = f"is of version {said.get('version')} and kind {said.get('kind')}, not of {VERSION} and head"
        raise ModelError(what, fix=AGAIN, file=str(path))
    return said


def load_head(folder: Path, embedding: Any) -> DraftHead:
    """The head of a folder over a model's embeddings, in fp32 on the host; for which model it was made is not asked.

    Raises:
        ModelError: the folder holds no head, or one of other sizes than it says or the model has.
    """
    said = dict(read_draft(folder)["settings"])
    file = safe.check_folder(folder)  # its header is sound
    try:
        shape = HeadShape(**{**said, "taps": tuple(said.get("taps", ()))})
        head = DraftHead(shape, embedding)
        head.load_state_dict(load_file(folder / next(iter(file))))
    except (TypeError, ValueError, RuntimeError, SafetensorError) as cause:
        what = f"the settings and the weights are not those of one head: {str(cause).splitlines()[0]}"
        raise ModelError(what, fix=AGAIN, file=str(folder)) from cause
    words, wide = embedding.weight.shape
    if wide != shape.embedded or int(head.ids.max()) >= words or int(head.ids.min()) < 0:
        what = f"is over embeddings {shape.embedded} wide and words up to {int(head.ids.max())}, not {wide} and {words}"
        raise ModelError(what, fix=AGAIN, file=str(folder))
    return head
