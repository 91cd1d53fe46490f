"""The verbs that make text: generate, chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.core.console import Console
from llmkit.core.environment import prepare
from llmkit.core.errors import ModelError, RecipeError
from llmkit.core.run import Grants
from llmkit.models.alias import is_remote
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve


def _open(model: str, code: bool) -> Any:
    if not Path(model).is_dir():
        resolve(ModelRef(name=model))  # a name that is none is told before the heavy imports
    import torch

    from llmkit.stages.build_inference import open_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = open_model(ModelRef(name=model), device, "auto", Grants(code=code))[0]
    if loaded.head is not None:
        what = f"{model} is a {loaded.head.task} classifier, and writes no text"
        raise ModelError(what, fix="evaluate it with a task of kind classification", key="model")
    return loaded


def generate(
    model: str, prompt: str, max_tokens: int, temperature: float, seed: int, raw: bool, as_json: bool, code: bool
) -> None:
    """Answers one prompt: through the chat template where there is one."""
    prepare(remote=is_remote(model))
    from llmkit.data.prompt import prompt_ids
    from llmkit.inference.node import Transformers
    from llmkit.inference.sampling import Sampling

    loaded = _open(model, code)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    asked: Any = prompt if raw or not loaded.tokenizer.chat_template else [{"role": "user", "content": prompt}]
    ids = prompt_ids(loaded.tokenizer, asked)
    made = Transformers().generate(loaded.model, loaded.tokenizer, [ids], sampling)[0]
    if as_json:
        facts = {"text": made.text, "token_ids": list(made.token_ids), "finish_reason": made.finish_reason}
        sys.stdout.write(json.dumps(facts | {"prompt_tokens": made.prompt_tokens}) + "\n")
    else:
        sys.stdout.write(made.text + "\n")


def generate_file(model: str, rows: str, output: str, sampling: Mapping[str, Any], raw: bool, code: bool) -> None:
    """Answers a file of prompts into another."""
    path, target = Path(rows), Path(output)
    if not path.is_file():
        raise RecipeError("is no file", fix="give a jsonl file of messages, prompt, or text", key="--input", file=rows)
    if target.exists():
        raise RecipeError("is there already", fix="name another --output", file=output)
    if not target.resolve().parent.is_dir():
        raise RecipeError("lies in no folder", fix="make its folder first", file=output)
    prepare(remote=is_remote(model))
    from llmkit.cli.batch import Work, answer, facts
    from llmkit.inference.sampling import Sampling

    asked = Sampling(**sampling)
    loaded = _open(model, code)
    work = Work(path, target, facts(model, loaded.resolved.facts(), path, asked, raw))
    count = answer(loaded, work, asked, raw, Console())
    sys.stdout.write(f"{output}: {count} answers\n")


def chat(model: str, max_tokens: int, temperature: float, seed: int, code: bool) -> None:
    """A conversation; answers appear as they are made."""
    prepare(remote=is_remote(model))
    from llmkit.inference.sampling import Sampling

    loaded = _open(model, code)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    said: list[dict[str, str]] = []
    while (line := _ask()).strip():
        said.append({"role": "user", "content": line})
        said.append({"role": "assistant", "content": _answered(loaded, said, sampling)})


def _answered(loaded: Any, said: list[dict[str, str]], sampling: Any) -> str:
    from llmkit.data.prompt import prompt_ids
    from llmkit.inference.generate import stream

    pieces: list[str] = []

    def say(piece: str) -> None:
        pieces.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()

    stream(loaded.model, loaded.tokenizer, prompt_ids(loaded.tokenizer, said), sampling, say)
    sys.stdout.write("\n")
    return "".join(pieces)


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""
