"""`llmkit generate`: one answer, or a file of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmkit.build.opened import Opened
from llmkit.cli.flags import speculation_of, tree_of
from llmkit.core.console import Console
from llmkit.core.convert import convert, wrapped
from llmkit.core.environment import prepare
from llmkit.core.errors import RecipeError
from llmkit.core.memory import device, out_of_memory_named
from llmkit.core.scalars import Origin
from llmkit.core.wording import Report
from llmkit.inference.request import Completion
from llmkit.inference.sampling import Sampling
from llmkit.models.alias import is_remote
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.recipe.inputs import remote
from llmkit.recipe.override import overridden

KNOB = "ask for fewer or shorter answers (--max-tokens), hold the model in fewer bits (--quant), or take a smaller one"


@dataclass(frozen=True)
class Asking:
    """Which model is asked, and how."""

    model: str
    said: Mapping[str, Any]
    """Fields of `Sampling`, by options of their own."""
    more: tuple[str, ...] = ()
    """Others, as KEY=VALUE."""
    generator: str = "engine"
    quant: str = ""
    raw: bool = False
    code: bool = False
    tensor: int | None = None
    placement: str = ""
    speculation: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Others beside the model: name -> folder."""

    def sampling(self) -> Sampling:
        """What is asked of each text.

        Raises:
            RecipeError: a field is none, or its value does not fit.
        """
        report = Report()
        tree = overridden(wrapped(dict(self.said), Origin("command line")), self.more, report)
        made = convert(Sampling, tree, "", report)
        report.stop_if_bad()
        sampling: Sampling = made
        return sampling

    def open(self) -> Any:
        """The model as an `LLM`.

        Raises:
            RecipeError, ModelError: it is none, cannot be loaded, or `generator` cannot run it.
            ResourceError: memory gave out.
        """
        generator = tree_of(self.generator, "--generator")
        placement = tree_of(self.placement, "--placement") if self.placement else None
        speculation = None if self.speculation is None else speculation_of(self.speculation)
        how: dict[str, Any] = {"quant": self.quant or None, "generator": generator, "tensor": self.tensor}
        how |= {"placement": placement, "speculation": speculation}
        asked = Opened(model=ModelRef(name=self.model), **how)  # what is wrong is told before the heavy imports
        prepare(remote=is_remote(self.model) or remote(asked))
        if not Path(self.model).is_dir():
            resolve(ModelRef(name=self.model))
        from llmkit.build.llm import LLM

        with out_of_memory_named(device(), KNOB):
            return LLM(self.model, allow_code=self.code, adapters=self.adapters, **how)


def generate(asking: Asking, prompt: str, as_json: bool) -> None:
    """Answers one prompt: through the chat template where there is one."""
    sampling = asking.sampling()
    llm = asking.open()
    asked: Any = prompt if asking.raw or not llm.tokenizer.chat_template else [{"role": "user", "content": prompt}]
    with out_of_memory_named(llm.device, KNOB):
        made = llm.generate([asked], sampling)[0].sound()
    if as_json:
        sys.stdout.write(json.dumps(told(made)) + "\n")
    else:
        sys.stdout.write("\n".join(output.text for output in made.outputs) + "\n")


def told(made: Completion) -> dict[str, Any]:
    """A completion as JSON values; of several answers all of them, and of tokens how likely they were where that was
    asked for."""
    facts: dict[str, Any] = {"text": made.text, "token_ids": list(made.token_ids), "finish_reason": made.finish_reason}
    facts |= {"prompt_tokens": made.prompt_tokens}
    if made.prompt_logprobs is not None:
        facts["prompt_logprobs"] = [None if token is None else asdict(token) for token in made.prompt_logprobs]
    if made.logprobs:
        facts["logprobs"] = [asdict(token) for token in made.logprobs]
    if len(made.outputs) > 1:
        facts["outputs"] = [asdict(output) for output in made.outputs]
    return facts


def generate_file(asking: Asking, rows: str, output: str) -> None:
    """Answers a file of prompts into another."""
    path, target = Path(rows), Path(output)
    if not path.is_file():
        raise RecipeError("is no file", fix="give a jsonl file of messages, prompt, or text", key="--input", file=rows)
    if target.exists():
        raise RecipeError("is there already", fix="name another --output", file=output)
    if not target.resolve().parent.is_dir():
        raise RecipeError("lies in no folder", fix="make its folder first", file=output)
    sampling = asking.sampling()
    llm = asking.open()
    from llmkit.cli.batch import Work, answer, facts

    more = {"raw": asking.raw, "generator": asking.generator, "quant": asking.quant}
    work = Work(path, target, facts(asking.model, llm.loaded.resolved.facts(), path, sampling, more))
    with out_of_memory_named(llm.device, KNOB):
        count = answer(llm, work, sampling, asking.raw, Console())
    sys.stdout.write(f"{output}: {count} answers\n")
