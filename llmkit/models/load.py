"""From files to a model: checked, on its device, with our attention, and what it supports."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from llmkit.core.deferred import Deferred
from llmkit.core.errors import ModelError
from llmkit.core.memory import is_out_of_memory
from llmkit.models import safe
from llmkit.models.adapted import Readers, adapted
from llmkit.models.attend import install
from llmkit.models.classified import HEADS, auto_class, begin, name_classes, without_head
from llmkit.models.finite import check_finite
from llmkit.models.fused import fuse
from llmkit.models.node import Head, ModelRef, Nf4, NoQuant, Quant
from llmkit.models.probe import Support
from llmkit.models.quantised import check_runs, settle
from llmkit.models.resolve import Resolved, head_of
from llmkit.models.rewarded import continues
from llmkit.models.rope import RopeScaling
from llmkit.models.scaled import check_turned, scaled_config, stretch
from llmkit.models.tokenizer import read_tokenizer
from llmkit.models.tokens import added, widen
from llmkit.models.tried import tried
from llmkit.models.unread import settled, unread
from llmkit.models.virtual import supported
from llmkit.models.wrappers import check_causal, check_whole, name_inner

FLOOR = (2, 10)
"""Older releases of torch read pickles unsafely even when told not to."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to run."""

    model: Any
    tokenizer: Any
    attention: str
    """The kind of attention in use."""
    support: Support
    resolved: Resolved
    added: tuple[int, ...] = ()
    """Ids of the tokens that the recipe added."""
    head: Head | None = None
    """What it tells apart, if it is a classifier."""
    fresh: tuple[str, ...] = ()
    """Modules that no file had weights for: a new head's."""
    deferred: Deferred = field(default_factory=Deferred)
    """Its weights that are still in their files."""


@dataclass(frozen=True)
class How:
    """How a model is held and what is allowed."""

    device: str = "cpu"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    half: bool = False
    """It computes in 16 bits, be it by autocast."""
    quant: Quant = NoQuant()
    allow_code: bool = False
    allow_nonfinite: bool = False
    short: Literal["bf16", "fp16"] = "bf16"
    """The 16 bits that it computes in, if it does."""
    head: Head | None = None
    """The classification head that it is to have; left out, the one that its files hold, if any."""
    deferred: bool = False
    """Its layers are to be cut over ranks: they are not read before that, where that can be."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(resolved: Resolved, ref: ModelRef, how: How, own: Readers | None = None) -> Loaded:
    """Loads a base model, or an adapter on its base; `own` reads the adapters that are not peft's.

    Raises:
        ModelError: naming the file, tensor or setting that does not fit.
    """
    _check_torch()
    base = resolved.base or resolved
    head = how.head or head_of(resolved)
    with quiet():
        rope = ref.rope or resolved.rope
        tokenizer = read_tokenizer(resolved, ref, how.allow_code)
        model, fresh, deferred = _base(base, how, head, tokenizer, rope)
        new = added(tokenizer, ref)
        if new or resolved.base is not None:
            widen(model, tokenizer, new)
        kind = install(model, ref.attention, how.half)
        with deferred.running():
            support = tried(model, base, new)
            if how.quant != NoQuant() and not support.packed:  # which has not run it
                check_runs(model)
            if not getattr(model, "is_quantized", False):
                fuse(model)
        if resolved.base is not None:
            model = adapted(model, resolved.folder, own)
            support = supported(support, model)
        model.eval()
        if rope is not None:
            stretch(tokenizer, model, rope)
    return Loaded(model, tokenizer, kind, support, resolved, new, head, tuple(sorted(fresh)), deferred)


def _check_torch() -> None:
    found = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if found < FLOOR:
        raise ModelError(
            f"torch {torch.__version__} reads files unsafely (CVE-2025-32434, CVE-2026-24747)",
            fix="install torch>=2.10",
        )


def _base(
    base: Resolved, how: How, head: Head | None, tokenizer: Any, rope: RopeScaling | None = None
) -> tuple[Any, set[str], Deferred]:
    from transformers import AutoModelForCausalLM

    said = safe.read_json(base.folder / "config.json")
    if "auto_map" in said and not how.allow_code:
        raise ModelError(f"{base.name} brings code of its own", fix="pass --allow-code to run it", key="model")
    bits = how.quant.config(DTYPES[how.short if how.half else how.dtype])
    if "quantization_config" in said and bits is not None:
        raise ModelError(f"{base.name} is quantised already", fix="drop quant", key="quant.kind")
    headers = safe.check_folder(base.folder)
    try:
        config = scaled_config(base, rope, how.allow_code)
    except (ValueError, KeyError, OSError) as cause:
        family = said.get("model_type", "no model_type")
        raise ModelError(
            f"{base.name} is of an unknown family ({family})", fix="use a causal LM", key="model"
        ) from cause
    if not how.allow_nonfinite:
        check_finite(base.folder, headers)
    kind: Any
    options: dict[str, Any] = {} if bits is None else {"quantization_config": bits}
    if head is None:
        check_causal(config, said, base.name)
        kind = AutoModelForCausalLM
    else:
        kind = _classifier(base, head, config, tokenizer)
        if bits is not None:
            bits.llm_int8_skip_modules = list(HEADS)
    model, told, deferred = _read(kind, base, config, how, headers, options)
    fresh: set[str] = set()
    if head is not None and head_of(base) is None:
        told, fresh = without_head(told, model)
        begin(model, fresh, head.seed)
    check_whole(told, hasattr(config, "text_config"), base.name)
    name_inner(model)
    if rope is not None:
        check_turned(model, rope)
    if bits is None:
        return settled(model, deferred, how.device), fresh, deferred
    settle(model)
    return model, fresh, deferred


def _read(
    kind: Any, base: Resolved, config: Any, how: How, headers: dict[str, safe.Header], options: dict[str, Any]
) -> tuple[Any, Any, Deferred]:
    """A model on the host, what transformers tells of it, and what of its weights is still in the files."""
    dtype = DTYPES[how.dtype]
    try:
        deferred = how.deferred and isinstance(how.quant, NoQuant | Nf4)
        if deferred and (made := unread(kind, base.folder, config, dtype, headers, options)):
            return made
        model, told = kind.from_pretrained(
            base.folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=how.allow_code,
            ignore_mismatched_sizes=True,  # told by name below
            output_loading_info=True,
            **options,
        )
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as cause:
        if is_out_of_memory(cause):
            raise
        why = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:160]
        raise ModelError(
            f"{base.name} cannot be loaded: {why}", fix="use a causal LM of transformers", key="model"
        ) from cause
    return model, told, Deferred()


def _classifier(base: Resolved, head: Head, config: Any, tokenizer: Any) -> Any:
    """The class that loads a base as a classifier, whose configuration says what it tells apart.

    Raises:
        ModelError: there is none, or it tells apart something else already.
    """
    there = head_of(base)
    if there is not None and not continues(head, there):
        what = f"{base.name} is a {there.task} classifier of {', '.join(there.labels)[:60]} already"
        raise ModelError(
            what, fix="train from its language model, or for the same labels in the same order", key="model"
        )
    kind = auto_class(head, config, base.name)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    name_classes(config, head, tokenizer.pad_token_id)
    return kind


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers; what it says goes to the run's log (core/runlog.py)."""
    from transformers.utils import logging as chatter

    bars = chatter.is_progress_bar_enabled()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            chatter.enable_progress_bar()
