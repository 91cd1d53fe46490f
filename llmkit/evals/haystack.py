"""Haystacks of made-up sentences with one fact in them: functions of a seed that read no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from llmkit.core.errors import RecipeError
from llmkit.core.seed import mixed
from llmkit.data.prompt import prompt_ids
from llmkit.data.render import Renderer

WHO = "the baker|a sailor|the old teacher|a quiet farmer|the mayor|a young painter|the postman|a tired nurse"
WHO += "|the carpenter|a visitor|the librarian|a musician|the gardener|a fisherman|the tailor|a student"
DOES = "walks past|looks at|talks about|thinks of|paints|remembers|repairs|sells|carries|cleans|describes|borrows"
DOES += "|draws|admires|misses|counts"
WHAT = "the green door|a wooden boat|the tall tower|an empty basket|the stone bridge|a small lamp|the red bicycle"
WHAT += "|an old map|the broken clock|a warm coat|the long fence|a blue bowl|the narrow path|a heavy chair"
WHAT += "|the silver spoon|a white horse"
WHERE = "near the river|in the morning|behind the school|on the hill|before lunch|at the market|in the rain"
WHERE += "|by the sea|after the concert|under the trees|in winter|along the road|at the station|during the fair"
WHERE += "|in the garden|beside the church"
TOWNS = "Lisbon|Oslo|Kyoto|Quito|Cairo|Prague|Dublin|Lima|Vienna|Hanoi|Tunis|Riga|Bern|Sofia|Accra|Havana"
FOODS = "grilled fish|lentil soup|plum cake|roast duck|goat cheese|apple pie|fried rice|mushroom stew|lamb chops"
FOODS += "|pumpkin bread|pepper sauce|egg noodles|corn salad|honey ice|bean curry|cherry jam|walnut tart|beef pie"
FOODS += "|crab rolls|onion rings"
GRAMMAR = tuple(part.split("|") for part in (WHO, DOES, WHAT, WHERE))
ASK = "There is one fact hidden in the text below. Find it and remember it."


@dataclass(frozen=True)
class Fact:
    """What is hidden: `lead` and one of `keys`, the first of which is the true one, answer `question`."""

    needle: str
    question: str
    lead: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Hidden:
    """A question about a haystack in tokens, up to where the key begins, and the keys to choose from."""

    prompt: tuple[int, ...]
    keys: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]


def fact(needle: str, distractors: int, seed: int, sample: int) -> Fact:
    """The fact of a sample: a number of five digits, or a sentence."""
    raw = (int(number) for number in _numbers(seed, sample, 0, 8 * (distractors + 4)))
    if needle == "number":
        numbers = dict.fromkeys(str(10_000 + number % 90_000) for number in raw)
        keys = tuple(numbers)[: distractors + 1]
        return Fact(
            f"The pass key is {keys[0]}. Remember it: {keys[0]} is the pass key.",
            "What is the pass key?",
            "The pass key is",
            keys,
        )
    town, foods = _pick(TOWNS.split("|"), next(raw)), FOODS.split("|")
    dishes = tuple(dict.fromkeys(_pick(foods, number) for number in raw))
    keys = (dishes + tuple(food for food in foods if food not in dishes))[: distractors + 1]
    lead = f"The best thing to eat in {town} is"
    return Fact(f"{lead} {keys[0]}.", f"What is the best thing to eat in {town}?", lead, keys)


def sentences(seed: int, sample: int, count: int) -> list[str]:
    """`count` sentences of the sample's filler; more of them begin with the same ones."""
    raw = iter(_numbers(seed, sample, 1, 4 * count).tolist())
    made = (" ".join(_pick(words, next(raw)) for words in GRAMMAR) for _ in range(count))
    return [f"{text[0].upper()}{text[1:]}." for text in made]


def _numbers(seed: int, sample: int, what: int, count: int) -> np.ndarray[Any, Any]:
    return np.random.Philox(key=mixed(seed, sample, what)).random_raw(count)


def _pick(words: Sequence[str], number: int) -> str:
    return words[number % len(words)]


class Haystacks:
    """Makes questions for one tokenizer and one sample, through its chat template where it has one."""

    def __init__(self, tokenizer: Any, hidden: Fact, seed: int, sample: int, longest: int) -> None:
        self.renderer, self.hidden = Renderer(tokenizer), hidden
        self.lead, self.keys = _split(tokenizer, [f"{hidden.lead} {key}" for key in hidden.keys])
        self.filler = sentences(seed, sample, longest // 4)
        told = tokenizer([f" {text}" for text in self.filler], add_special_tokens=False)["input_ids"]
        self.sizes = np.cumsum([len(ids) for ids in told])

    def asked(self, length: int, depth: float, key: str) -> Hidden:
        """The longest question that fits, key and all, in `length` tokens; the fact lies at `depth` (0 first, 1 last).

        Raises:
            RecipeError: not even the question fits.
        """
        room = length - max(map(len, self.keys)) - len(self.lead)
        bare = len(self._prompt(0, depth))
        if bare > room:
            least = bare + length - room
            raise RecipeError(f"{length} tokens do not hold the question", fix=f"give {least} or more", key=key)
        count = int(np.searchsorted(self.sizes, room - bare, side="right"))
        prompt = self._prompt(count, depth)
        while len(prompt) > room:  # sentences in their places may take a few tokens more than alone
            count -= 1
            prompt = self._prompt(count, depth)
        return Hidden((*prompt, *self.lead), self.keys, self.hidden.keys)

    def _prompt(self, count: int, depth: float) -> list[int]:
        place = round(depth * count)
        told = [*self.filler[:place], self.hidden.needle, *self.filler[place:count]]
        text = f"{ASK}\n\n{' '.join(told)}\n\n{self.hidden.question}"
        if self.renderer.tokenizer.chat_template:
            return prompt_ids(self.renderer, [{"role": "user", "content": text}])
        return prompt_ids(self.renderer, f"{text}\n")


def _split(tokenizer: Any, answers: Sequence[str]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """What the answers' tokens begin with alike, and how each goes on; at least one token is left of each."""
    told = [tuple(ids) for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]]
    alike = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*told, strict=False)))
    alike = min(alike, *(len(ids) - 1 for ids in told))
    return told[0][:alike], tuple(ids[alike:] for ids in told)
