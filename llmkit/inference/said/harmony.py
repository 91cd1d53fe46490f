"""The channels of gpt-oss: what it thinks (`analysis`), says (`final`, `commentary`) and calls (`to=functions.f`).

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
    <|message|>{...}<|call|>

The format is OpenAI's "harmony".
"""

from __future__ import annotations

import re

from llmkit.inference.said.jsontext import SPACE
from llmkit.inference.said.named import closed
from llmkit.inference.said.source import Source, Wait
from llmkit.inference.said.thinking import body
from llmkit.inference.said.told import Told, arguments

STARTS = ("<|start|>", "<|channel|>")
ENDS = ("<|end|>", "<|call|>", "<|return|>", *STARTS)
RECIPIENT = re.compile(r"to=functions\.([A-Za-z0-9_.\-]{1,128})(?![A-Za-z0-9_.\-])")
LONGEST_HEADER = 512


def part(src: Source, told: Told) -> Wait[bool]:
    """The messages that follow a mark that begins one."""
    mark = "<|start|>"
    while mark in STARTS:
        header = yield from src.until("<|message|>", LONGEST_HEADER)
        if header is None:
            return False
        if (to := RECIPIENT.search(header)) is not None:
            return (yield from _call(src, told, to[1]))
        channel = header.rpartition("<|channel|>")[2].split()[:1]
        mark = yield from body(src, ENDS, told.reasoning if channel == ["analysis"] else told.text)
        src.forget(mark)
    return True


def _call(src: Source, told: Told, name: str) -> Wait[bool]:
    yield from src.run(SPACE)
    text = yield from arguments(src, told, name)
    if text is None or not told.call(name, text):
        return False
    return (yield from closed(src, told, "<|call|>"))
