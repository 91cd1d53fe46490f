"""A model's tokenizer, with the recipe's tokens and its template over its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.core.errors import ModelError
from llmkit.core.memory import is_out_of_memory
from llmkit.models.node import ModelRef
from llmkit.models.resolve import Resolved
from llmkit.models.tokens import add


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
        _check_syntax(tokenizer, ref.template)
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


def _check_syntax(tokenizer: Any, name: str) -> None:
    """Raises:
    ModelError: it is no Jinja template.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as cause:
        raise ModelError(
            f"is no Jinja template ({cause.message})", fix="mend it", file=name, line=cause.lineno, key="model.template"
        ) from cause
    except (TemplateError, LookupError, TypeError, ValueError, AttributeError):
        return  # it may want other messages than this one
