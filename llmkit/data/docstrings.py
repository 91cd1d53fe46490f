"""A data set made on the spot from the running Python's standard library: what does this function do?"""

from __future__ import annotations

import ast
import copy
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

from llmkit.data.rows import At, Raw

SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "turtledemo",
    "encodings",
    "idle_test",
}
QUESTION = "Describe in one sentence what this Python function does.\n\n```python\n{source}\n```"
SHORTEST, LONGEST = 80, 1200
"""Characters of a function's source."""


def read(split: str, after: At = (), kind: str = "") -> Iterator[Raw]:
    """The rows of one split behind `after`: answers, or rows of another `kind`: labels, pairs or steps.

    Modules are dealt to splits whole, by the hash of their name.
    """
    return islice(_read(split, kind), after[0] if after else 0, None)


def _read(split: str, kind: str) -> Iterator[Raw]:
    seen: set[str] = set()
    other = ""
    for module, path in _modules():
        held_out = hashlib.sha256(module.encode()).digest()[0] < 26  # about a tenth
        if held_out != (split == "valid"):
            continue
        for line, source, sentence in functions(path):
            if source not in seen:
                seen.add(source)
                question = {"role": "user", "content": QUESTION.format(source=source)}
                answer = {"role": "assistant", "content": sentence}
                values = {"prompt": [question], "completion": [answer], "cluster": module}
                if kind == "pairs":
                    other, rejected = sentence, {"role": "assistant", "content": other or "It does nothing at all."}
                    values = {"prompt": [question], "chosen": [answer], "rejected": [rejected], "cluster": module}
                if kind == "steps":
                    other, steps = sentence, [sentence, other or "It does nothing at all."]
                    labels: Any = [True, False]
                    values = {"prompt": [question], "completions": steps, "labels": labels, "cluster": module}
                if kind == "labels":
                    label = "value" if gives_value(source) else "nothing"
                    values = {"text": sentence, "label": label, "cluster": module}
                yield Raw(values, f"python:{module}", line, at=(len(seen),))


def _modules() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED & set(parts) and not parts[0].startswith(("_sysconfigdata", "config-")):
            found.append((".".join(parts), path))
    return found


def functions(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, source without its docstring, first sentence of it) of each documented function of a file."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # fixtures of the library that are broken on purpose
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        sentence = first_sentence(ast.get_docstring(node) or "")
        if not sentence or len(node.body) < 2:
            continue
        bare = copy.copy(node)
        bare.body, bare.decorator_list = node.body[1:], []
        source = ast.unparse(bare)
        if SHORTEST <= len(source) <= LONGEST:
            yield node.lineno, source, sentence


def gives_value(source: str) -> bool:
    """Whether a function returns a value or yields some."""
    waiting: list[ast.AST] = list(cast(ast.FunctionDef, ast.parse(source).body[0]).body)
    while waiting:
        node = waiting.pop()
        constant = isinstance(node, ast.Return) and isinstance(node.value, ast.Constant) and node.value.value is None
        if isinstance(node, ast.Yield | ast.YieldFrom) or (
            isinstance(node, ast.Return) and node.value and not constant
        ):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return False


def first_sentence(text: str) -> str:
    """The first sentence of a docstring as one line, or nothing when it is none."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    match = re.match(r"(.+?[.!?])(?=\s|$)", paragraph)
    sentence = match[1] if match else paragraph + "."
    words = len(sentence.split())
    usable = 4 <= words <= 30 and sentence.isascii() and sentence[0].isupper() and "::" not in sentence
    return sentence if usable else ""
