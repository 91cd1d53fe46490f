"""Trees of drafts over ranks that hold a model together: all of them move the same keys and values."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from llmkit.build.ranked import Spread, opened, rank_of
from llmkit.core.ranks import ranks
from llmkit.inference.blocks import Blocks
from llmkit.inference.cache import Cache
from llmkit.inference.check import Facts
from llmkit.inference.engine import Engine
from llmkit.inference.ranks import Led, follow
from llmkit.inference.request import Request
from llmkit.inference.runner import Runner
from llmkit.inference.sampling import Sampling
from llmkit.inference.scheduler import Limits
from llmkit.inference.speculation.drafter import Ask, Draft
from llmkit.inference.speculation.source import Source
from llmkit.inference.speculation.speculator import Speculator
from llmkit.inference.text import Texts
from llmkit.models.families import tiny
from llmkit.models.node import ModelRef, NoQuant
from llmkit.models.resolve import resolve
from llmkit.parallel.group import joined
from tests.conftest import make_tokenizer
from tests.distributed import together

Said = dict[str, list[int]]


class Second:
    """Drafts what comes as the second branch of a tree, so that it is always moved."""

    classes, free = 1, True

    def __init__(self, said: Said) -> None:
        self.said = said

    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        return [self.one(ask) for ask in asks]

    def one(self, ask: Ask) -> Draft:
        text = self.said[ask.sequence.request.id][ask.sequence.made :][: ask.count]
        wrong = [(token + 1) % 64 for token in text]
        tokens = [token for both in zip(wrong, text, strict=True) for token in both]
        parents = [parent for at in range(len(text)) for parent in (2 * at - 1, 2 * at - 1)]
        return Draft(tokens, [0] * len(tokens), parents)


def answers(forward: Led, store: Any, said: Said | None) -> tuple[Said, Engine]:
    facts, texts = Facts(64, 128, ()), Texts(make_tokenizer())
    drafts = None if said is None else Speculator([Source(Second(said), 3)], fixed=True)
    runner, limits = Runner(forward, store), Limits(24, 8)
    engine = Engine(runner, Blocks(32, 4), limits, facts, texts, forward.copy, None, drafts, forward.move)
    made: Said = {}
    for at in range(3):
        engine.add(
            Request(str(at), tuple(range(3 + at, 9 + 3 * at)), Sampling(max_tokens=12, seed=at, temperature=at / 2))
        )
    while not engine.idle:
        for event in engine.step():
            made.setdefault(event.request, []).extend(token.id for token in event.tokens)
    return made, engine


def test_ranks_move_what_a_tree_leaves(tmp_path: Path) -> None:
    tiny("Llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    ref = ModelRef(name=str(tmp_path / "model"))

    def work(index: int) -> None:
        with joined(ranks(), "cpu", serves=True) as group:
            spread = Spread(ref, NoQuant(), {"device": "cpu"}, Cache(block=4), 32 * 4)
            rank = rank_of(opened(resolve(ref), spread), spread, group)
            if index:
                follow(rank)
                return
            led = Led(rank)
            plain, without = answers(led, rank.store, None)
            made, engine = answers(led, rank.store, plain)
            assert made == plain
            stats = engine.stats()
            assert stats.accepted >= 0.4 * stats.drafted and stats.steps < without.stats().steps / 2
            led.close()

    together(2, work, tmp_path)
