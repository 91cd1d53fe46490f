"""Who is asked in words and answers by rules: patterns that are found in an answer or are not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from llmkit.inference.request import Ask, Completion, Output
from llmkit.rl.role_node import Rules

PART = "<{tag}>\n(.*)\n</{tag}>"
"""What is asked about, in the words of `worded`, whose parts cannot close their tags."""


class RulesWriter:
    """Answers as a critic, as a reviser or as a judge, by what it is asked about."""

    def __init__(self, rules: Rules) -> None:
        self.patterns, self.instead = [re.compile(one) for one in rules.patterns], rules.instead

    def each(self, asks: Iterable[Ask]) -> Iterator[Completion]:
        """A completion for each ask, in their order: the same for all answers that it wants."""
        for ask in asks:
            said = ask.prompt.said
            text = said if isinstance(said, str) else str(said[-1].get("content") or "") if said else ""
            made = Output(self.answer(text), (), "stop")
            yield Completion((made,) * ask.sampling.n, 0)

    def close(self) -> None:
        """It holds nothing."""

    def answer(self, text: str) -> str:
        """What is said of one ask; who is asked is told by what it ends with."""
        if text.endswith("</answer_b>"):
            return self._judged(*(self._count(_part(text, tag)) for tag in ("answer_a", "answer_b")))
        answer = _part(text, "answer")
        return self._revised(answer) if text.endswith("</critique>") else self._looked_at(answer)

    def _judged(self, first: int, second: int) -> str:
        verdict = "tie" if first == second else "A" if first < second else "B"
        return f"A has {first} places that a pattern finds, B has {second}.\nVerdict: {verdict}"

    def _looked_at(self, answer: str) -> str:
        found = [match[0].strip() for one in self.patterns for match in one.finditer(answer)]
        if not found:
            return "Nothing is found.\nVerdict: keep"
        return "Found: " + ", ".join(f'"{one[:60]}"' for one in found[:3]) + "\nVerdict: revise"

    def _revised(self, answer: str) -> str:
        for one in self.patterns:
            answer = one.sub(lambda _: self.instead, answer)
        return answer.strip()

    def _count(self, answer: str) -> int:
        return sum(1 for one in self.patterns for _ in one.finditer(answer))


def _part(text: str, tag: str) -> str:
    found = re.search(PART.format(tag=tag), text, re.DOTALL)
    return found[1] if found else ""
