"""E4 at size: forms by chance, sound and unsound, are taken or refused in bounded time and memory; so is the next."""

from __future__ import annotations

import json
import os
import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from llmkit.inference import grammars as module
from llmkit.inference.grammar import Choice, JsonSchema, Lark, Regex
from llmkit.inference.grammar_worker import MEMORY, SECONDS
from llmkit.inference.grammars import Grammars
from llmkit.inference.request import RequestError
from tests.conftest import make_tokenizer
from tests.serve.mutated import GRAMMARS, PATTERNS, schemas, written

WORDS, END = 448, 2
MIB, PAGE = 1 << 20, resource.getpagesize()


def pattern(rng: random.Random) -> str:
    """Some of them put together, counted and cut."""
    made = "".join(f"({one})" if rng.random() < 0.5 else one for one in rng.choices(PATTERNS, k=rng.randrange(1, 4)))
    made += rng.choice(["", "", "*", "+?", "{3}", "{1,400}", "{0,100000}", "|", "|b", "$"])
    return made if rng.random() < 0.8 else made[: rng.randrange(len(made) + 1)]


def grammar(rng: random.Random) -> str:
    """One, changed in some letters, or with a form of another kind in it."""
    made = rng.choice([*GRAMMARS, f"start: /{pattern(rng)}/", f"start: %json {written(schemas(rng))}", 'start: "a"'])
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(made) + 1)
        made = (
            made[:at]
            + rng.choice(["", "(", ")", '"', "/", "|", "{5}", "start", "\n", "~", "é", "?", "*"])
            + made[at + 1 :]
        )
    return made


def form(number: int) -> JsonSchema | Regex | Lark | Choice:
    rng = random.Random(f"form {number}")
    kind = rng.randrange(5)
    if kind < 2:
        schema = schemas(rng)
        return JsonSchema(schema=written({"type": "object", "properties": {"a": schema}} if kind else schema))
    if kind == 2:
        return Regex(pattern=pattern(rng) or "a")
    if kind == 3:
        return Lark(grammar=grammar(rng) or "a")
    return Choice(choices=tuple(pattern(rng)[:2000] or "a" for _ in range(rng.choice([1, 3, 200, 1024]))))


def resident(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def walked(match: object, rng: random.Random) -> None:
    for _ in range(20):
        found = np.flatnonzero(match.mask(WORDS))  # type: ignore[attr-defined]
        token = int(found[rng.randrange(len(found))])
        if token == END:
            return
        match.take(token)  # type: ignore[attr-defined]


def run(numbers: range) -> dict[str, int]:
    tried, told = Grammars(make_tokenizer(), WORDS, (END,)), {"taken": 0, "refused": 0, "late": 0}
    tried.matcher(Regex(pattern="a+"))
    base, most = resident(tried.trial.process.pid), 0.0  # type: ignore[union-attr]
    for number in numbers:
        began = time.process_time()
        try:
            match = tried.matcher(form(number))
        except RequestError as cause:
            told["refused"] += 1
            problem = cause.problems[0]
            assert problem.key.startswith("grammar") and "nothing was heard" not in problem.what, problem
        else:
            told["taken"] += 1
            try:
                walked(match, random.Random(number))
            except RequestError:  # a state of it is too slow: it ends one request
                told["late"] += 1
        most = max(most, time.process_time() - began)
        assert len(tried.kept) <= module.KEPT and tried.bytes <= module.BYTES
        if tried.trial.process is not None and tried.trial.process.poll() is None:
            assert resident(tried.trial.process.pid) < base + MEMORY
    assert tried.matcher(Regex(pattern="b+")).mask(WORDS).any()
    tried.trial.close()
    assert most < 4 * SECONDS, "what was tried beside took too long here"
    return told


def test_e4_forms_by_chance_are_taken_or_refused() -> None:
    told = run(range(40))
    assert told["taken"] > 5 and told["refused"] > 5


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_e4_three_thousand_forms() -> None:
    count = int(os.environ.get("LLMKIT_FUZZ", "3000"))
    run(range(1000, 1300))
    before = resident("self")
    told = run(range(1300, 1000 + count))
    grown = (resident("self") - before) / MIB
    print(json.dumps(told), f"{grown:.0f} MiB more")
    assert grown < 512
