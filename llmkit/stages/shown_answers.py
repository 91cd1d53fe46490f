"""Answers on a page of their own: those that a policy drew, and those of which the best were kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from llmkit.data.order import spread
from llmkit.stages.rollouts import PAGE, Group, Shown, Turn, ordered, read
from llmkit.stages.rollouts_page import write_page

Bands = Mapping[str, list[tuple[float, float, float]]]


def shown_answers(folder: Path) -> tuple[str, Bands]:
    """Writes the page of what is in a stage's folder; gives a line that leads to it, and what figures range over."""
    found = read(folder / "rollouts.jsonl", _reuse(folder))
    if found.extents:
        told = write_page(folder, folder.name, found.groups(), found.answers, len(found.extents))
        return told, found.bands()
    places = _places(folder / "answers.jsonl")
    if not places:
        return "", {}
    answers = sum(count for _, count, _ in places)
    return write_page(folder, folder.name, _kept(folder, places), answers, len(places)), {}


def _reuse(folder: Path) -> int:
    """How many steps learned from each rollout."""
    path = folder / "resolved.yaml"
    said = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else None
    rollout = said.get("rollout") if isinstance(said, dict) else None
    return int(rollout.get("reuse", 1)) * int(rollout.get("parts", 1)) if isinstance(rollout, dict) else 1


def _places(path: Path) -> list[tuple[int, int, int]]:
    """Of each prompt of `kind: best_of` where its line begins, how many answers it has, and how long it is."""
    made, begin = list[tuple[int, int, int]](), 0
    if path.is_file():
        with path.open("rb") as file:
            for at, line in enumerate(file):
                if at and line.endswith(b"\n"):  # the first one says what the others are of
                    made.append((begin, len(json.loads(line)["answers"]), len(line)))
                begin += len(line)
    return made


def _kept(folder: Path, places: list[tuple[int, int, int]]) -> Iterator[Group]:
    """As many prompts as a page holds, evenly over all."""
    asked = _asked(folder / "predictions.jsonl")
    mean = sum(size for _, _, size in places) / len(places)
    with (folder / "answers.jsonl").open("rb") as file:
        for at in spread(len(places), max(1, int(PAGE / mean))):
            file.seek(places[at][0])
            line = json.loads(file.readline())
            question = [Turn("user", asked[at])] if at < len(asked) else []
            answers = [_answer(one) for one in line["answers"]]
            yield ordered(at + 1, f"row {at + 1} · {line['place']}", question, answers)


def _asked(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def _answer(one: Mapping[str, Any]) -> Shown:
    scores = {name: float(value) for name, value in one["scores"].items()}
    turns = [Turn("assistant", one["text"])]
    return Shown(float(one["score"]), scores, None, turns, one["tokens"], one["finish_reason"] != "length")
