"""Whether what drafts can be made for a model: asked of the model's configuration, before any answer is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.build.head_drafting import START, check_taps
from llmkit.build.student import narrow, picked
from llmkit.core.errors import ModelError
from llmkit.models import drafts
from llmkit.models.here import config_here
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.models.safe import read_json
from llmkit.models.tokenizer import read_tokenizer
from llmkit.models.words import other_words

if TYPE_CHECKING:
    from llmkit.stages.draft_distilled import Distilled
    from llmkit.stages.draft_head import HeadDrafter


def check_distilled(node: Distilled, model: ModelRef, fetch: bool) -> None:
    """Sees to it that a small model can be made of a model, or goes on for it; one that is not here is asked where it
    may be fetched.

    Raises:
        RecipeError: it has no such layers, or is not wider than that.
        ModelError: its family cannot be narrowed, or the one to start from has other tokens.
    """
    if node.start is not None:
        if fetch or (config_here(node.start) and config_here(model)):
            _same_tokens(node.start, model)
        return
    if (config := _config(model, fetch)) is not None:
        picked(node.layers, int(config.num_hidden_layers))
        if node.width is not None:
            narrow(config, node.width)


def check_head(node: HeadDrafter, model: ModelRef, fetch: bool) -> None:
    """Sees to it that a head can read a model, or goes on for it.

    Raises:
        RecipeError: it has no such layers.
        ModelError: the head to start from is none, or is of other sizes or tokens.
    """
    config = _config(model, fetch)
    if config is not None:
        check_taps(node.taps, int(config.num_hidden_layers))
    if node.start is None or not (fetch or _ended(node.start)):
        return
    said = drafts.read(drafts.folder_of(node.start, START), "head", START)
    if config is None:
        return
    if said.target.vocabulary != drafts.vocabulary(read_tokenizer(resolve(model), model)):
        what = f"{node.start} was made for a model of other tokens"
        raise ModelError(what, fix="leave drafter.start out", key=START)
    if said.settings.get("width") != config.hidden_size:
        what = f"{node.start} reads hidden states {said.settings.get('width')!r:.40} wide, not {config.hidden_size}"
        raise ModelError(what, fix="leave drafter.start out", key=START)


def _ended(start: str) -> bool:
    """Whether a folder is no run that has yet to end: an earlier stage may be what makes it."""
    folder = Path(start).expanduser()
    return folder.is_dir() and ((folder / "manifest.json").is_file() or not (folder / "status.json").is_file())


def _same_tokens(start: ModelRef, model: ModelRef) -> None:
    ours, its = (read_tokenizer(resolve(ref), ref) for ref in (model, start))
    if why := other_words(ours, its):
        what = f"{start.name} has another vocabulary: {why}"
        raise ModelError(what, fix="name a model of the same tokenizer", key=START)


def _config(model: ModelRef, fetch: bool) -> Any:
    """The settings of the model's text part; None where it is not here, or of a family with code of its own."""
    from transformers import CONFIG_MAPPING

    said: Mapping[str, Any] | None = config_here(model)
    if said is None and fetch:
        resolved = resolve(model)
        said = read_json((resolved.base or resolved).folder / "config.json")
    if said is None or said.get("model_type") not in CONFIG_MAPPING:
        return None
    return CONFIG_MAPPING[said["model_type"]].from_dict(dict(said)).get_text_config()
