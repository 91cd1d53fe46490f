"""The ways in which families write tool calls and reasoning, as a table, and which of them a chat template speaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmkit.core.errors import RecipeError
from llmkit.inference.said import harmony, named, objects, python
from llmkit.inference.said.source import SPACE, Source, Wait
from llmkit.inference.said.tagged import Tags
from llmkit.inference.said.thinking import Thinking
from llmkit.inference.said.told import Told

Reader = Callable[[Source, Told], Wait[bool]]
"""Reads a call and tells it; false where it is none."""


@dataclass(frozen=True)
class Calls:
    """How a family writes tool calls."""

    marks: Mapping[str, Reader] = field(default_factory=dict)
    """What begins a call, wherever it stands, and what reads what follows."""
    bare: Mapping[str, Reader] = field(default_factory=dict)
    """Characters that begin one where they are the first of the answer; they are read again."""
    frames: Mapping[str, Reader] = field(default_factory=dict)
    """Marks that are there without tools too."""
    special: bool = False
    """Whether marks are special tokens, which the text must then hold."""
    signs: tuple[str, ...] = ()
    """Texts of which a chat template that speaks it holds one."""


@dataclass(frozen=True)
class Format:
    """How a model's answers are written."""

    calls: Calls
    thinking: Thinking | None = None

    def shown(self, tools: bool) -> bool | tuple[str, ...]:
        """Special tokens that have text, so that they are read: all of them where calls or channels are written in
        them, else those around a thought."""
        if self.calls.special and (tools or self.calls.frames):
            return True
        return () if self.thinking is None else (self.thinking.begin, self.thinking.end)

    def begun(self, prompt: str) -> bool:
        """Whether the prompt's end has begun the reasoning already."""
        return self.thinking is not None and prompt.rstrip().endswith(self.thinking.begin)


def _hermes(src: Source, told: Told) -> Wait[bool]:
    yield from src.run(SPACE)
    return (yield from objects.call(src, told)) and (yield from named.closed(src, told, "</tool_call>"))


QWEN3_CODER = Tags("<function=", ">", "<parameter=", ">", "", "</parameter>", ("</function>", "</tool_call>"))
MINIMAX = Tags('<invoke name="', '">', '<parameter name="', '">', "", "</parameter>", ("</invoke>",))
GLM = Tags("", "", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", ("</tool_call>",))

TOOLS: dict[str, Calls] = {
    "harmony": Calls(frames=dict.fromkeys(harmony.STARTS, harmony.part), special=True, signs=("<|channel|>",)),
    "deepseek": Calls(
        {
            "<｜tool▁calls▁begin｜>": named.mark,
            "<｜tool▁calls▁end｜>": named.mark,
            "<｜tool▁call▁begin｜>": named.deepseek,
        },
        special=True,
        signs=("<｜tool▁calls▁begin｜>",),
    ),
    "kimi": Calls(
        {
            "<|tool_calls_section_begin|>": named.mark,
            "<|tool_calls_section_end|>": named.mark,
            "<|tool_call_begin|>": named.kimi,
        },
        special=True,
        signs=("<|tool_calls_section_begin|>",),
    ),
    "minimax": Calls(
        {
            "<minimax:tool_call>": named.mark,
            "</minimax:tool_call>": named.mark,
            MINIMAX.function: MINIMAX.body,
        },
        signs=("<minimax:tool_call>",),
    ),
    "glm": Calls({"<tool_call>": GLM.read}, signs=("<arg_key>",)),
    "qwen3_coder": Calls(
        {"<tool_call>": QWEN3_CODER.read, QWEN3_CODER.function: QWEN3_CODER.body}, signs=("<function=",)
    ),
    "mistral": Calls({"[TOOL_CALLS]": named.mistral}, special=True, signs=("[TOOL_CALLS]",)),
    "hermes": Calls({"<tool_call>": _hermes}, signs=("<tool_call>",)),
    "pythonic": Calls({"<|python_tag|>": python.calls}, {"[": python.calls}, special=True, signs=("[func_name1(",)),
    "llama3": Calls(
        {"<|python_tag|>": objects.several},
        {"{": objects.several},
        special=True,
        signs=("<|python_tag|>", '"parameters":'),
    ),
    "none": Calls(),
}
"""By name; of several that a template has signs of, the first is meant."""

FORCED = Calls(bare={"[": objects.listed})
"""What a grammar made of the tools (`choice.py`) lets the model write."""

THOUGHTS = {
    "think": Thinking("<think>", "</think>"),
    "mistral": Thinking("[THINK]", "[/THINK]"),
    "none": None,
}


def format_of(template: str, tools: str = "auto", reasoning: str = "auto") -> Format:
    """The format of a chat template's text, or the one that is named.

    Raises:
        RecipeError: there is none of that name.
    """
    if tools == "auto":
        signs = [name for name, calls in TOOLS.items() if any(sign in template for sign in calls.signs)]
        tools = (signs or ["none"])[0]
    if reasoning == "auto":
        found = [name for name, marks in THOUGHTS.items() if marks is not None and marks.end in template]
        reasoning = (found or ["none"])[0]
    for key, value, known in (("tool_format", tools, TOOLS), ("reasoning_format", reasoning, THOUGHTS)):
        if value not in known:
            raise RecipeError(f"{value} is no format", fix=f"use auto or one of {', '.join(known)}", key=key)
    return Format(TOOLS[tools], THOUGHTS[reasoning])
