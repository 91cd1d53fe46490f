"""The tests of llama.cpp's server, run against ours.

    python benchmarks/llamacpp_tests.py --source LLAMA.CPP [--model FOLDER] [--show]

LLAMA.CPP is a checkout (its tests of 2026). Test files are laid beside a `utils` of ours and
run with every assertion on its own: one that fails is noted and the test goes on, so that a private field at its
beginning does not hide what follows. Prints a table by file; what fails for no reason known here makes the exit 1.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks" / "peers")]
FILES = ("test_basic.py", "test_chat_completion.py", "test_completion.py", "test_embedding.py", "test_tokenize.py")
FAILURES = ("AssertionError", "KeyError", "IndexError", "TypeError", "AttributeError")


class Apart(ast.NodeTransformer):
    """Each assertion is noted where it fails."""

    def __init__(self, source: str) -> None:
        self.source = source

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """`try: assert ... except: note(...)`."""
        said = ast.get_source_segment(self.source, node.test) or ""
        call = ast.parse(f"note({node.lineno}, {said!r}, _cause)").body[0]
        kinds = ast.Tuple([ast.Name(name, ast.Load()) for name in FAILURES], ast.Load())
        return ast.Try([node], [ast.ExceptHandler(kinds, "_cause", [call])], [], [])


def lay(source: Path, folder: Path) -> None:
    """Their tests beside our `utils`."""
    own = ROOT / "benchmarks" / "peers"
    for name, text in (("utils.py", "llamacpp_utils.py"), ("conftest.py", "llamacpp_conftest.py")):
        (folder / name).write_text((own / text).read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    for name in FILES:
        text = (source / "tools" / "server" / "tests" / "unit" / name).read_text()
        (folder / name).write_text(ast.unparse(ast.fix_missing_locations(Apart(text).visit(ast.parse(text)))))


def ran(source: Path, model: Path) -> list[dict[str, Any]]:
    """What each test came to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay(source, folder)
        results = folder / "results.json"
        env = os.environ | {"SERVED": str(model), "RESULTS": str(results), "PYTHONPATH": os.pathsep.join(sys.path[:3])}
        words = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=line", "-m", "not slow", "."]
        subprocess.run([sys.executable, *words], cwd=folder, env=env, stdout=sys.stderr)
        return list(json.loads(results.read_text()))


def reason(test: str, noted: str) -> tuple[bool, str]:
    """Whether a test is about what is private, and why an assertion does not hold; no words where that is not known."""
    from llamacpp_reasons import REASONS

    said = f"{test}: {noted}"
    return next(((about, why) for about, why, pattern in REASONS if re.search(pattern, said)), (False, ""))


def table(results: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """A row for each file and for each reason, and what has none."""
    lines, unknown = (
        ["| file | tests | hold | hold but for asides | private, or not so here |", "|---|---|---|---|---|"],
        [],
    )
    counts: Counter[str] = Counter()
    for file in FILES:
        kinds: Counter[str] = Counter()
        for one in (one for one in results if one["file"] == file and not one["skipped"]):
            found = {note: reason(one["test"], note) for note in one["notes"]}
            unknown += [f"{one['test']}: {note}" for note, (_, why) in found.items() if not why]
            counts.update({why for _, why in found.values()})
            kinds[_kind(found.values())] += 1
        lines.append(f"| `{file}` | {kinds.total()} | {kinds['whole']} | {kinds['aside']} | {kinds['not']} |")
    return "\n".join(
        [*lines, "", "| why not | tests |", "|---|---|", *(f"| {w} | {n} |" for w, n in counts.most_common())]
    ), unknown


def _kind(found: Collection[tuple[bool, str]]) -> str:
    if not found:
        return "whole"
    return "not" if any(about or not why for about, why in found) else "aside"


def main() -> int:
    from tests.conftest import make_model, make_tokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="A tiny one without it.")
    parser.add_argument("--show", action="store_true", help="Every test and what did not hold.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = given.model or Path(name)
        if given.model is None:
            make_model(max_position_embeddings=4096).save_pretrained(model)
            make_tokenizer().save_pretrained(model)
        results = ran(given.source, model)
    for one in results if given.show else ():
        print(one["test"], *(f"    {note} [{reason(one['test'], note)[1]}]" for note in one["notes"]), sep="\n")
    said, unknown = table(results)
    print(said, *(f"no reason: {one}" for one in unknown), sep="\n")
    return int(bool(unknown))


if __name__ == "__main__":
    sys.exit(main())
