"""Whether an answer is the reference's, as mathematics: math-verify reads both and compares what they are worth."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any, Literal

from llmkit.core.errors import ResourceError
from llmkit.rl.checked import Check, Told, Unscored, column_of, each, short

MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[|\\begin\{")
"""What says itself where its mathematics begins."""
PROSE = re.compile(r"[A-Za-z]{2,} +[A-Za-z]{2,}")
LONGEST = 20_000
"""Letters of an answer, from its end: the answer comes last."""


def check(column: str, where: Literal["anywhere", "boxed"]) -> Check:
    """Whether the answer is worth what `column` says.

    Raises:
        ResourceError: math-verify is not installed.
    """
    parse, verify = _library()

    @lru_cache(1024)
    def reference(said: str) -> Any:
        return parse(_delimited(said), parsing_timeout=None)

    def score(told: Told) -> float:
        said = column_of(told, column)
        wanted = reference(said)
        if not wanted:
            raise Unscored(f"column {column} holds no mathematics: {short(said)}")
        answer = told["completion"][-LONGEST:]
        if where == "boxed":
            inner = boxed(answer)
            if inner is None:
                return 0.0
            answer = f"\\boxed{{{inner}}}"
        return float(verify(wanted, parse(answer, parsing_timeout=None), timeout_seconds=None))

    return each(score)


def _library() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify
    except ImportError as cause:
        what = f"math-verify cannot be imported ({cause})"
        raise ResourceError(what, fix="pip install 'llmkit[maths]'", key="kind") from cause
    for name in ("math_verify.parser", "math_verify.grader"):  # that its own bounds are off: they are this process's
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return parse, verify


def _delimited(said: str) -> str:
    """A reference as math-verify reads it: GSM8K's is behind ####, and a bare formula is all of it."""
    said = said.rpartition("####")[2].strip()
    return said if MARKED.search(said) or PROSE.search(said) else f"\\boxed{{{said}}}"


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` of a text holds, braces and all; None where none is whole."""
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    depth, start = 0, begin + len("\\boxed")
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[start + 1 : at]
    return None
