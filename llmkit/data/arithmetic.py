"""A data set made on the spot: sums whose answers can be checked, for policies and for trying things out."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.core.seed import mixed
from llmkit.data.rows import At, Raw

ASKED = "What is {left} {sign} {right}? Write only the number, inside <answer> and </answer>."
SIGNS = ("+", "-")
TRAIN, VALID = 0, 1


def read(split: str, count: int, most: int, after: At = (), pairs: bool = False, shown: int = 0) -> Iterator[Raw]:
    """Rows `after` to `count` of a split, or pairs of a right answer and a wrong one; numbers are from 0 to `most`, and
    no sum is in both splits. Before each stand the first `shown` sums of the training split, answered."""
    before = [turn for index in range(shown) for turn in _turns(*_drawn("train", index, most))[:2]]
    for index in range(after[0] if after else 0, count):
        question, answer, result = _turns(*_drawn(split, index, most))
        prompt = [*before, question]
        values = {"prompt": prompt, "completion": [answer], "answer": str(result)}
        if pairs:
            wrong = {"role": "assistant", "content": _wrong(index, result)}
            values = {"prompt": prompt, "chosen": [answer], "rejected": [wrong]}
        yield Raw(values, f"arithmetic:{split}", index + 1, at=(index + 1,))


def _turns(left: int, right: int, sign: str) -> tuple[dict[str, str], dict[str, str], int]:
    """A question, its answer, and the number that it is."""
    result = left + right if sign == "+" else left - right
    question = {"role": "user", "content": ASKED.format(left=left, sign=sign, right=right)}
    return question, {"role": "assistant", "content": f"<answer>{result}</answer>"}, result


def _wrong(index: int, result: int) -> str:
    """By turns another number, the number without its tags, and both faults with many words."""
    other = result + 1 + mixed(index, result, 1) % 9
    return (f"<answer>{other}</answer>", str(result), f"Let me see. The result of this is about {other}.")[index % 3]


def _drawn(split: str, index: int, most: int) -> tuple[int, int, str]:
    """The numbers of a row: of all sums, those of one split."""
    side, turn = VALID if split == "valid" else TRAIN, 0
    while True:
        number = mixed(index, side, most, turn)
        sign, rest = SIGNS[number % 2], number // 2
        left, right = rest % (most + 1), rest // (most + 1) % (most + 1)
        held_out = mixed(left, right, number % 2) % 10 == 0
        if held_out == (side == VALID):
            return left, right, sign
        turn += 1
