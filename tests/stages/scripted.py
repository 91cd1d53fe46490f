"""Who answers by a script: roles of the constitution's stage with faults that are known."""

from __future__ import annotations

import threading
from random import Random
from typing import Any

from llmkit.rl import constitution as words

MARKS = {"harm": "HARMFUL", "lie": "FALSE", "slur": "RUDE"}
"""What goes against each principle of the test's."""


class Script:
    """Who answers as `model`: a pure function of what is asked and of its seed, with known faults."""

    def __init__(self, bias: float = 0.0, missed: float = 0.0, failed: float = 0.0) -> None:
        self.bias, self.missed, self.failed = bias, missed, failed
        self.asked, self.most = list[tuple[str, str, int]](), 1 << 30
        self.lock = threading.Lock()

    def answer(self, body: dict[str, Any], index: int) -> str:
        said, draw = body["messages"], Random(f"{body['messages']}{body['seed']}{index}{body['model']}")
        system, text = said[0]["content"], said[-1]["content"]
        roles = {"writer": self.writer, "critic": self.critic, "reviser": self.reviser, "judge": self.judge}
        return {**roles, "longest": self.longest, "strict": self.strict}[body["model"]](system, text, draw)

    def strict(self, _: str, text: str, draw: Random) -> str:
        first, second = ("e" in part(text, tag) for tag in ("answer_a", "answer_b"))
        return "Verdict: tie" if first == second else f"Verdict: {'B' if first else 'A'}"

    def longest(self, _: str, text: str, draw: Random) -> str:
        first, second = (len(part(text, tag)) for tag in ("answer_a", "answer_b"))
        return f"Verdict: {'A' if first > second else 'B' if second > first else 'tie'}"

    def writer(self, _: str, text: str, draw: Random) -> str:
        if "harmless" in text:
            return draw.choice(["I'm sorry, but I can't help with that.", "Gladly: here it is.", "Of course."])
        marks = [mark for mark in MARKS.values() if draw.random() < 0.3]
        return " ".join([f"words {draw.randrange(1000)} on {text}", *marks])

    def critic(self, system: str, text: str, draw: Random) -> str:
        mark = next(mark for name, mark in MARKS.items() if f"{name}-like" in system)
        said = part(text, "answer")
        wrong = mark in said or words.refuses(said)
        return f"It was looked at.\nVerdict: {'revise' if wrong and draw.random() >= self.missed else 'keep'}"

    def reviser(self, system: str, text: str, draw: Random) -> str:
        mark = next(mark for name, mark in MARKS.items() if f"mend {name}" in system)
        said = part(text, "answer")
        if words.refuses(said):
            return "Here it is."
        return said if draw.random() < self.failed else said.replace(f" {mark}", "")

    def judge(self, system: str, text: str, draw: Random) -> str:
        mark = next(mark for name, mark in MARKS.items() if f"free of {name}" in system)
        first, second = (mark in part(text, tag) for tag in ("answer_a", "answer_b"))
        both = sorted(part(text, tag) for tag in ("answer_a", "answer_b"))
        if Random("".join(both)).random() < self.bias:
            return "Verdict: A"
        return "Verdict: tie" if first == second else f"Verdict: {'B' if first else 'A'}"


def part(text: str, tag: str) -> str:
    return text.partition(f"<{tag}>\n")[2].partition(f"\n</{tag}>")[0]
