"""From files to a model: checked, on its device, with our attention, and what it supports."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llmkit.core.errors import ModelError
from llmkit.core.memory import is_out_of_memory
from llmkit.models import safe
from llmkit.models.adapted import Readers, adapted
from llmkit.models.attend import install
from llmkit.models.fused import fuse
from llmkit.models.node import ModelRef, NoQuant, Quant
from llmkit.models.probe import Support, probe
from llmkit.models.resolve import Resolved
from llmkit.models.rope import RopeScaling
from llmkit.models.scaled import check_turned, scaled_config, stretch
from llmkit.models.tokens import add, added, widen
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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(resolved: Resolved, ref: ModelRef, how: How, own: Readers | None = None) -> Loaded:
    """Loads a base model, or an adapter on its base; `own` reads the adapters that are not peft's.

    Raises:
        ModelError: naming the file, tensor or setting that does not fit.
    """
    _check_torch()
    base = resolved.base or resolved
    with quiet():
        rope = ref.rope or resolved.rope
        model = _base(base, how, rope)
        tokenizer = read_tokenizer(resolved, ref, how.allow_code)
        new = added(tokenizer, ref)
        if new or resolved.base is not None:
            widen(model, tokenizer, new)
        kind = install(model, ref.attention, how.half)
        support = probe(model)
        if how.quant != NoQuant() and not support.packed:  # which has not run it
            _check_runs(model)
        if not getattr(model, "is_quantized", False):
            fuse(model)
        if resolved.base is not None:
            model = adapted(model, resolved.folder, own)
            support = supported(support, model)
        model.eval()
        if rope is not None:
            stretch(tokenizer, model, rope)
    return Loaded(model, tokenizer, kind, support, resolved, new)


def _check_torch() -> None:
    found = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if found < FLOOR:
        raise ModelError(
            f"torch {torch.__version__} reads files unsafely (CVE-2025-32434, CVE-2026-24747)",
            fix="install torch>=2.10",
        )


def _base(base: Resolved, how: How, rope: RopeScaling | None = None) -> Any:
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
        kind = said.get("model_type", "no model_type")
        raise ModelError(f"{base.name} is of an unknown family ({kind})", fix="use a causal LM", key="model") from cause
    if not how.allow_nonfinite:
        _check_finite(base.folder, headers)
    options: dict[str, Any] = {} if bits is None else {"quantization_config": bits}
    check_causal(config, said, base.name)
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            base.folder,
            config=config,
            dtype=DTYPES[how.dtype],
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
    check_whole(told, hasattr(config, "text_config"), base.name)
    name_inner(model)
    if rope is not None:
        check_turned(model, rope)
    if bits is None:
        return model.to(how.device)
    _check_bits(model)
    _mend_bits(model)
    return model


def _check_bits(model: Any) -> None:
    """Raises:
    ModelError: nothing is quantised: transformers passes linears of a class of their own by, and says nothing.
    """
    if not any("bitsandbytes" in type(module).__module__ for module in model.modules()):
        what = f"none of the linears of {type(model).__name__} can be quantised"
        raise ModelError(what, fix="drop quant", key="quant.kind")


def _check_runs(model: Any) -> None:
    """Raises:
    ModelError: the family reads weights past their modules, as Mamba does, and cannot read quantised ones.
    """
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 2]], device=model.device), use_cache=False)
    except (RuntimeError, TypeError, ValueError) as cause:
        if is_out_of_memory(cause):
            raise
        why = (str(cause).splitlines() or [""])[0][:120]
        what = f"{type(model).__name__} does not run with quantised weights ({why})"
        raise ModelError(what, fix="drop quant", key="quant.kind") from cause


def _mend_bits(model: Any) -> None:
    """On CPUs with bf16 dot products bitsandbytes repacks a 4-bit weight in its first evaluation, and later gradients
    are wrong; this keeps its plain layout."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _check_finite(folder: Path, headers: dict[str, safe.Header]) -> None:
    from safetensors import safe_open

    for file, header in headers.items():
        with safe_open(folder / file, "pt") as held:
            for name in header:
                value = held.get_tensor(name)
                if value.is_floating_point() and value.element_size() > 1 and not torch.isfinite(value).all():
                    raise ModelError(
                        f"{name} holds NaN or infinity",
                        fix="use sound weights, or pass --allow-nonfinite to look at them",
                        file=str(folder / file),
                    )


def read_tokenizer(resolved: Resolved, ref: ModelRef, allow_code: bool = False) -> Any:
    """The tokenizer of a model's folder, or of its base's, with the recipe's tokens and its template over its own."""
    from transformers import AutoTokenizer

    own = (resolved.folder / "tokenizer_config.json").is_file() or (resolved.folder / "tokenizer.json").is_file()
    folder = resolved.folder if own or resolved.base is None else resolved.base.folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=allow_code)
    except (ValueError, OSError, KeyError) as cause:
        if is_out_of_memory(cause):
            raise
        raise ModelError(
            f"has no tokenizer that can be read ({str(cause).splitlines()[0][:120]})",
            fix="add tokenizer.json",
            file=str(folder),
        ) from cause
    add(tokenizer, ref)
    if ref.template is not None:
        tokenizer.chat_template = _template(ref.template)
    return tokenizer


def _template(name: str) -> str:
    """The chat template of a file, or one of ours by its name."""
    ours = {path.stem: path for path in Path(__file__).with_name("templates").glob("*.jinja")}
    try:
        return ours.get(name, Path(name)).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        why = cause.strerror if isinstance(cause, OSError) else "it is no UTF-8"
        fix = f"give a file, or one of {', '.join(sorted(ours))}"
        raise ModelError(f"{name} cannot be read ({why})", fix=fix, key="model.template") from cause


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
