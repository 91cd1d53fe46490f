"""Trees of drafts: what is made is what is made without, and the cache holds what it would hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from llmkit_kernels.build import lacks
from llmkit_kernels.paged import laid
from llmkit_kernels.paged.laid import Held

from llmkit.cli.speculation.drafters import DRAFTERS, Branching
from llmkit.cli.speculation.equality import compared
from llmkit.cli.speculation.tiny import family, lively
from llmkit.cli.speculation.trial import Made, Schedule, Trial
from llmkit.cli.speculation.ways import WAYS, asked
from llmkit.inference import place, runner, scheduler
from llmkit.inference.paths import depths, following, next_of
from llmkit.inference.place import Place
from llmkit.inference.request import Request, Token
from llmkit.inference.runner import Rows
from llmkit.inference.sampling import Sampling
from llmkit.inference.sequence import Sequence as Text
from llmkit.inference.speculation.drafter import Ask, Draft
from llmkit.inference.speculation.model import Small
from llmkit.inference.speculation.most import MOST
from llmkit.inference.speculation.rates import Rates
from llmkit.inference.speculation.source import Source
from llmkit.inference.speculation.speculator import Speculator
from llmkit.inference.speculation.tree import Tree, first, likeliest, ordered
from llmkit.inference.speculation.tree import laid as laid_out
from llmkit.inference.steer import Rules, Steer
from llmkit.models.paged import BlockStore

here = pytest.mark.skipif(bool(lacks("linear") or lacks("paged")), reason=lacks("linear") or lacks("paged"))
TREES = {"branching": DRAFTERS["branching"]}
TREE = (-1, 0, -1, 1, 2, 1)


def differ(trial: Trial, way: str, seeds: Sequence[int], count: int = 6) -> int:
    found = compared(trial, asked(3, count, way), TREES, seeds)["branching"]
    assert not found.leaked and found.accepted < found.drafted
    return found.different


@here
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_of_half_caches(dtype: torch.dtype) -> None:
    assert not differ(Trial(lively(), dtype=dtype), "drawn", range(2), 4)


@here
@pytest.mark.parametrize("name", ["Gemma-3", "gpt-oss"])
def test_of_windows_and_sinks(name: str) -> None:
    assert not differ(Trial(family(name)), "temperature", range(2), 2)


@here
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_in_many_schedules(way: str) -> None:
    for size in (3, 4, 16):
        found = compared(Trial(lively(), size=size), asked(size, 8, way), TREES, range(20))["branching"]
        assert not found.different, found.first


def held(trial: Trial, drafted: bool) -> dict[bytes, list[torch.Tensor]]:
    """What lies under each name in the cache after some answers, by layers."""
    requests = asked(1, 6, "drawn")
    drafter = Branching(trial.plain(requests), trial.words, 1) if drafted else None
    engine = trial.engine(Schedule(1, drafts=8), drafter)
    for one in requests:
        engine.add(one)
    while not engine.idle:
        engine.step()
    store = engine.runner.store
    assert isinstance(store, BlockStore) and (engine.stats().accepted > 20) == drafted
    named = engine.scheduler.blocks.found.items()
    return {name: [part for layer in store.layers.values() for part in parts(layer, block)] for name, block in named}


def parts(layer: Held, block: int) -> list[torch.Tensor]:
    """Of a block, without the lanes past its tokens, which hold anything."""
    keys, *others = layer.tensors
    return [keys[block, :, :, : layer.block], *(one[block, :, : layer.block] for one in others)]


def same_cache(trial: Trial) -> None:
    plain, made = held(trial, False), held(trial, True)
    assert plain.keys() == made.keys() and len(plain) > 20
    for name, there in plain.items():
        assert all(torch.equal(a, b) for a, b in zip(there, made[name], strict=True))


@here
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8], ids=str)
def test_the_cache_holds_what_it_would_hold(dtype: torch.dtype | None) -> None:
    same_cache(Trial(lively(), dtype=dtype))


def walked(tokens: Sequence[int], chosen: Sequence[int], parents: Sequence[int] = TREE) -> tuple[list[int], list[int]]:
    """The path over drafts where these are chosen, and the rows that they were chosen from."""
    rows = Rows(lambda hidden: hidden, torch.empty(9, 1), torch.arange(9.0)[:, None])
    place = Place(Text(Request("", (1, 2), Sampling()), 0, [1, 2]), rows, tokens, parents)
    seen = []
    for token in chosen:
        seen.append(int(place.logits))
        if not place.take(Token(token, None, 0.0)):
            break
    return place.path, seen


def test_the_walk_goes_on_at_the_draft_that_follows_and_was_chosen() -> None:
    tokens = [7, 8, 9, 5, 5, 6]  # 7 -> 8 -> (5, 6); 9 -> 5
    assert walked(tokens, [7, 8, 6, 1]) == ([0, 1, 5], [2, 3, 4, 8])  # two rows of what came before
    assert walked(tokens, [9, 5, 1]) == ([2, 4], [2, 5, 7])
    assert walked(tokens, [9, 8]) == ([2], [2, 5])  # 8 follows another
    assert walked(tokens, [5]) == ([], [2])
    assert walked(tokens, [7, 8, 9, 1], ()) == ([0, 1, 2], [2, 3, 4, 5])


def test_what_is_taken_of_a_tree_is_a_tree_the_likeliest_path_first() -> None:
    drawn = random.Random(0)
    for size in (1, 5, 40, 90):
        parents = [drawn.randint(-1, at - 1) for at in range(size)]
        draft, chances = Draft([*range(size)], [0] * size, parents), list[float]()
        for parent in parents:
            chances.append((chances[parent] if parent >= 0 else 1.0) * drawn.uniform(0.2, 0.99))
        best = ordered(Tree(draft, chances))
        assert len(best.chances) == min(size, MOST)
        for count in range(len(best.chances) + 1):
            made = laid_out(first(best, count))
            assert sorted(made.tokens) == sorted(sorted(range(size), key=lambda at: -chances[at])[:count])
            follows = {token: made.tokens[parent] if parent >= 0 else -1 for token, parent in pairs(made)}
            assert all(parents[token] == parent for token, parent in follows.items())
            path = likeliest(first(best, count)).draft.tokens
            assert made.tokens[: len(path)] == path
        chain = likeliest(Tree(draft, chances)).draft
        worth = sum(chances[token] for token in chain.tokens)
        assert all(parents[token] == before for before, token in zip([-1, *chain.tokens], chain.tokens, strict=False))
        for leaf in range(size):
            total, at = 0.0, leaf
            while at >= 0:
                total, at = total + chances[at], parents[at]
            assert total <= worth + 1e-9


def test_the_path_that_lies_first_is_the_one_that_goes_on_the_likeliest() -> None:
    tree = Tree(Draft([5, 6, 7, 8], [0] * 4, [-1, -1, 1, 2]), [0.5, 0.4, 0.39, 0.38])  # 5, which ends; 6 -> 7 -> 8
    assert laid_out(tree).tokens == [6, 7, 8, 5]
    assert laid_out(first(tree, 2)).tokens == [5, 6]


def test_of_drafts_that_are_bounded_the_likeliest_are_taken() -> None:
    """A bound on a request's drafts leaves them by their chances, so that fewer of them are the likeliest too."""

    class Fixed:
        classes, free = 3, True

        def draft(self, asks: Sequence[Ask]) -> list[Draft]:
            return [Draft([5, 6, 7, 8], [2, 1, 0, 0], [-1, -1, 0, 1]) for _ in asks]

    one = Text(Request("", (1,), Sampling(max_tokens=9, drafts=3)), 0, [1, 2], cached=1)
    source = Source(Fixed(), 4)
    source.rates.right = [0.1, 0.8, 0.9]
    source.rates.tried = [1.0] * 3
    speculator = Speculator([source], fixed=True)
    steer = Steer(Rules(one.request, ()), [])
    speculator.propose([one], lambda _: steer, 3, 0, trees=True)  # room for two beside its newest token
    assert one.drafts == [5, 6] and one.parents == [-1, -1]


def test_which_draft_follows_which() -> None:
    assert following(3, (), -1) == [0] and following(3, (), 1) == [2] and following(3, (), 2) == []
    assert following(4, (-1, 0, -1, 0), -1) == [0, 2] and following(4, (-1, 0, -1, 0), 0) == [1, 3]
    assert next_of([5, 6, 7, 6], (-1, 0, -1, 2), 2, 6) == 3 and next_of([5, 6], (), 0, 5) == -1


def pairs(draft: Draft) -> list[tuple[int, int]]:
    return list(zip(draft.tokens, draft.parents or range(-1, len(draft.tokens) - 1), strict=True))


def test_all_drafts_of_a_place_are_learned_of_and_none_past_what_came() -> None:
    rates, one = Rates(4), Text(Request("", (1,), Sampling()), 0, [1])
    rates.note(one, Draft([7, 8, 9, 5], [0, 1, 2, 3], [-1, -1, 1, 0]))  # 7 -> 5; 8 -> 9
    one.tokens += [8, 4]
    before = [rates.of(each) for each in range(4)]
    rates.learn(one)
    now = [rates.of(each) for each in range(4)]
    assert now[0] < before[0] and now[1] > before[1] and now[2] < before[2] and now[3] == before[3]
    assert rates.chances(one, Draft([1, 2, 3], [1, 1, 3], [-1, 0, -1]))[2] > 0.4


@here
def test_a_drafter_of_trees_drafts_chains_where_the_model_takes_no_trees() -> None:
    trial, requests = Trial(lively()), asked(0, 4, "greedy")
    plain = trial.plain(requests)
    for attribute in ("trees", "move"):
        engine = trial.engine(Schedule(0, drafts=8), Branching(plain, trial.words, 0))
        if attribute == "move":
            engine.move = None
        else:
            engine.runner.forward = NoTrees(trial.decoder)
        for one in requests:
            engine.add(one)
        made = Made()
        while not engine.idle:
            for event in engine.step():
                made.events.setdefault((event.request, event.index), []).append(event)
            assert not any(one.parents for one in engine.scheduler.running)
        assert made.told() == plain.told() and engine.stats().accepted


@here
def test_what_a_model_might_say_beside_what_it_would_say_is_drafted_too() -> None:
    trial, requests, accepted = Trial(lively()), asked(5, 8, "temperature"), list[int]()
    plain = trial.plain(requests)
    for width in (1, 3):
        small = Small(trial.near, BlockStore(200, 4), trial.words, 512, width)
        made = trial.run(requests, Schedule(0, drafts=4, sequences=1), small)
        assert made.told() == plain.told()
        accepted.append(made.accepted)
    assert accepted[1] > accepted[0]


@here
def test_where_a_move_fails_nothing_is_lost() -> None:
    trial, requests, drawn, failed = Trial(lively()), asked(0, 6, "stopped"), random.Random(0), 0
    plain = trial.plain(requests)
    engine, made = trial.engine(Schedule(0, drafts=8), Branching(plain, trial.words, 0)), Made()
    move = engine.move

    def fails(sources: Sequence[int], targets: Sequence[int]) -> None:
        if drawn.random() < 0.4:
            raise RuntimeError("no memory")
        assert move is not None
        move(sources, targets)

    engine.move = fails
    for one in requests:
        engine.add(one)
    while not engine.idle:
        try:
            for event in engine.step():
                made.events.setdefault((event.request, event.index), []).append(event)
        except RuntimeError:
            failed += 1
    assert failed and made.told() == plain.told()


class NoTrees:
    """A model whose attention takes a tree's tokens one by one."""

    trees = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


Patch = pytest.MonkeyPatch


def row_of_the_parent(patch: Patch) -> None:
    """What follows a draft is read off the row of the one before it in the path."""

    def logits(self: Place) -> Any:
        last = self.path[-2] if len(self.path) > 1 else -1
        return self.rows[len(self.rows) - len(self.drafts) + last]

    patch.setattr(Place, "logits", property(logits))


def row_by_depth(patch: Patch) -> None:
    """Rows are counted as if the drafts were a chain."""
    patch.setattr(
        Place,
        "logits",
        property(lambda self: self.rows[len(self.rows) - 1 - len(self.drafts) + len(self.path)]),
    )


def moved(change: Callable[[list[tuple[int, int]]], list[tuple[int, int]]]) -> Callable[[Patch], None]:
    """Other slots are moved than those of the path."""

    def plant(patch: Patch) -> None:
        moves = scheduler.Scheduler.moves
        patch.setattr(scheduler.Scheduler, "moves", lambda self, one, path: change(moves(self, one, path)))

    return plant


def one_by_one(patch: Patch) -> None:
    """A slot is read after it was written to."""
    move = BlockStore.move

    def wrong(self: BlockStore, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in reversed(list(zip(sources, targets, strict=True))):
            move(self, [source], [target])

    patch.setattr(BlockStore, "move", wrong)


def by_index(patch: Patch) -> None:
    """A draft stands where its index is, not as deep as it is."""
    patch.setattr(runner.Chunk, "places", property(lambda self: range(self.start, self.end)))


def sibling_seen(patch: Patch) -> None:
    """A draft sees all before it, whatever they follow."""
    patch.setattr(laid, "tree", lambda parents: ([(2 << at) - 1 for at in range(len(parents))], depths(parents)))


def stranger(patch: Patch) -> None:
    """The walk takes any draft of the tree that is what was chosen."""

    def wrong(drafts: Sequence[int], parents: Sequence[int], last: int, token: int) -> int:
        return next((at for at in range(last + 1, len(drafts)) if drafts[at] == token), -1)

    patch.setattr(place, "next_of", wrong)


def never_moved(patch: Patch) -> None:
    """What others find are the first drafts, whoever's path they were of."""
    patch.setattr(BlockStore, "move", lambda self, sources, targets: None)


def text() -> None:
    trial = Trial(lively())
    assert not differ(trial, "drawn", range(3))


def cache() -> None:
    same_cache(Trial(lively()))


DEFECTS: dict[str, tuple[Callable[[Patch], None], Callable[[], None]]] = {
    "the row of the parent": (row_of_the_parent, text),
    "rows of a chain": (row_by_depth, text),
    "no move": (moved(lambda pairs: []), text),
    "a move of the wrong slots": (moved(lambda pairs: [(source + 1, target) for source, target in pairs]), text),
    "a move to the wrong slots": (moved(lambda pairs: [(source, target + 1) for source, target in pairs]), text),
    "a move of the last alone": (moved(lambda pairs: pairs[-1:]), text),
    "slots overwritten before they are read": (one_by_one, text),
    "positions by index": (by_index, text),
    "a sibling is seen": (sibling_seen, text),
    "a draft of another branch": (stranger, text),
    "a sibling among what others find": (never_moved, cache),
}


@here
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_of_trees_is_found(name: str, monkeypatch: Patch) -> None:
    plant, find = DEFECTS[name]
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        find()
