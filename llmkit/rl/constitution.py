"""A constitution at work: which principles a row draws, what is asked of critic, reviser and judge, what they say."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from random import Random

import yaml

from llmkit.core.convert import convert, wrapped
from llmkit.core.errors import RecipeError
from llmkit.core.scalars import Origin
from llmkit.core.seed import mixed
from llmkit.core.shipped import folder
from llmkit.core.wording import Report
from llmkit.rl.constitution_node import Constitution, Principle
from llmkit.rl.judge import PAIR
from llmkit.rl.sample import Messages
from llmkit.rl.worded import worded

CRITIC = """You look at an answer to a request in the light of one principle.

The principle: {principle}

Say in a few sentences where the answer goes against the principle, if it does, and quote what does. A principle is not
a reason to refuse what harms nobody. Then end with one line: "Verdict: revise" or "Verdict: keep"."""
REVISER = """You write an answer to a request anew, because it was found to go against a principle.

What to do: {principle}

You are given the request, the answer and what was said against it. Keep all that nothing was said against. Write the
new answer alone, with nothing before or after it."""
VERDICT = re.compile(r"^\W*verdict\W+(keep|revise)\b", re.IGNORECASE | re.MULTILINE)
REFUSAL = re.compile(
    r"\b(i|we) ?(can ?not|can['’]t|won['’]t|will not|( ?am|['’]m) (unable|not able)|must decline|have to decline)\b"
    r"|\b(i['’]m|i am) (sorry|afraid)\b|^\W*(sorry|unfortunately)\b|\bas an ai\b",
    re.IGNORECASE,
)
"""How an answer begins that does not do what was asked."""
BEGINS = 160
"""Letters of an answer that are looked at for that."""


def read(given: str) -> Constitution:
    """A constitution by its file, or by the name of one that llmkit ships.

    Raises:
        RecipeError: there is none, or it is not written as one.
    """
    path = Path(given).expanduser()
    path = path if path.is_file() else folder() / "constitution" / f"{given}.yaml"
    try:
        said = yaml.safe_load(path.read_text("utf-8"))
    except OSError as cause:
        known = ", ".join(sorted(file.stem for file in (folder() / "constitution").glob("*.yaml")))
        what = f"there is no constitution {given}"
        raise RecipeError(what, fix=f"give a file, or one of: {known}", key="constitution") from cause
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        what = f"{path} is no YAML ({' '.join(str(cause).split())[:120]})"
        raise RecipeError(what, fix="mend the file", key="constitution") from cause
    if not isinstance(said, dict):
        raise RecipeError(f"{path} is no mapping", fix="write name and principles", key="constitution")
    report = Report()
    made = convert(Constitution, wrapped(said, Origin(str(path))), "constitution", report)
    report.stop_if_bad()
    if not isinstance(made, Constitution):
        raise RecipeError(f"{path} is no constitution", fix="write name and principles", key="constitution")
    return made


def digest(constitution: Constitution) -> str:
    """Of all words that models are asked in."""
    words = [asdict(constitution), CRITIC, REVISER, PAIR]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def drawn(constitution: Constitution, count: int, seed: int, row: int) -> list[Principle]:
    """`count` principles for a row, none of them twice before all were there once: a function of seed and row."""
    made: list[Principle] = []
    for turn in range(-(-count // len(constitution.principles))):
        left = list(constitution.principles)
        Random(mixed(seed, row, turn)).shuffle(left)
        made += left
    return made[:count]


def critique(principle: Principle, prompt: str | Messages, answer: str) -> Messages:
    """What the critic is asked."""
    return worded(CRITIC.format(principle=principle.critique), prompt, {"answer": answer})


def revision(principle: Principle, prompt: str | Messages, answer: str, said: str) -> Messages:
    """What the reviser is asked."""
    return worded(REVISER.format(principle=principle.revision), prompt, {"answer": answer, "critique": said})


def preference(principle: Principle, prompt: str | Messages, first: str, second: str) -> Messages:
    """What the judge is asked."""
    return worded(PAIR.format(rubric=principle.preference), prompt, {"answer_a": first, "answer_b": second})


def objects(said: str) -> bool | None:
    """Whether a critic wants the answer written anew; None where it does not say."""
    found = VERDICT.findall(said)
    return found[-1].lower() == "revise" if found else None


def refuses(answer: str) -> bool:
    """Whether an answer begins as a refusal does."""
    return bool(REFUSAL.search(answer.strip()[:BEGINS]))


def soft(votes: list[tuple[float | None, float | None]], clip: float) -> tuple[float, bool] | None:
    """How likely the first of two answers is the better one, clipped to [`clip`, 1 - `clip`], and whether both orders
    agree on which it is; `votes` are what it was worth in each order. None where no vote is whole."""
    whole = [(one, other) for one, other in votes if one is not None and other is not None]
    if not whole:
        return None
    sides = [sum(side) / len(whole) for side in zip(*whole, strict=True)]
    agree = (sides[0] - 0.5) * (sides[1] - 0.5) >= 0
    return min(max(sum(sides) / 2, clip), 1 - clip), agree
