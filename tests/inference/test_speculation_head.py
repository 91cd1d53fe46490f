"""A head in the engine drafts what it says over the whole text at once, on each path of a tree, whatever happened."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from llmkit_kernels.build import lacks

from llmkit.cli.speculation.tiny import lively
from llmkit.cli.speculation.trial import SIZE, Made, Schedule, Trial
from llmkit.cli.speculation.ways import asked
from llmkit.core.types import Packed, Segment
from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling
from llmkit.inference.speculation.drafter import Ask, Draft
from llmkit.inference.speculation.growth import EDGES, LIKELIEST
from llmkit.inference.speculation.head import Head
from llmkit.models.draft_head import DraftHead, shape_for
from llmkit.models.draft_run import HeadRun
from llmkit.models.paged import BlockStore
from llmkit.models.taps import Taps

here = pytest.mark.skipif(bool(lacks("linear") or lacks("paged")), reason=lacks("linear") or lacks("paged"))
NEAR = 2e-3
"""How far a probability may be off: keys are kept in fp32."""


class Noted(Head):
    """Keeps what it was asked and what it drafted, where it knew all of the text, or `every` time."""

    every = False

    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        made = super().draft(asks)
        self.notes = getattr(self, "notes", [])
        self.asked = getattr(self, "asked", 0) + sum(ask.count > 0 for ask in asks)
        for ask, draft in zip(asks, made, strict=True):
            held = self.following.room.of(ask.sequence)
            if draft.tokens and (held.whole or self.every):
                self.notes.append((list(ask.sequence.tokens), ask.count, draft))
        return made


def head_of(trial: Trial, words: int = 48, seed: int = 3) -> DraftHead:
    """With some of the words, not in their order."""
    torch.manual_seed(seed)
    ids = torch.randperm(trial.words)[:words]
    head = DraftHead(shape_for(trial.model, words), trial.decoder.causal.get_input_embeddings(), ids)
    for weight in head.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.2)
    return head


def drafter(trial: Trial, head: DraftHead, width: int, blocks: int = 400, floor: float = 0.0) -> Noted:
    run, store = HeadRun(head, trial.decoder.device), BlockStore(blocks, SIZE)
    return Noted(run, store, Taps(trial.decoder.causal, head.taps).take, trial.words, width, floor)


@torch.no_grad()
def laws(trial: Trial, head: DraftHead, text: Seq[int], draft: Draft) -> list[torch.Tensor]:
    """Of each draft the head's law of its place, by its forward over the whole text and the path before it."""
    told = trial.model(torch.tensor([text[:-1]]), output_hidden_states=True, use_cache=False).hidden_states
    features = head.features([told[at][0] for at in head.taps])
    parents = draft.parents or range(-1, len(draft.tokens) - 1)
    read: dict[int, Any] = {}
    """After each draft, -1 after the text: tokens, features, and what the head makes of the last of them."""
    made: list[torch.Tensor] = []
    for at, parent in enumerate([-2, *parents], -1):
        tokens, rows = list(text[1:]), features
        if at >= 0:
            tokens, rows, last = read[parent]
            made.append(head.logits(last)[0].softmax(0))
            tokens, rows = [*tokens, draft.tokens[at]], torch.cat([rows, last])
        whole = Packed((Segment(0, 0, len(rows)),))
        read[at] = tokens, rows, head(torch.tensor(tokens), rows, torch.arange(len(rows)), whole)[-1:]
    return made


def check(trial: Trial, head: DraftHead, notes: Any) -> int:
    """How many drafts were compared."""
    ids, kinds, count = head.ids.tolist(), len(EDGES) + 1, 0
    for text, _, draft in notes:
        for token, sureness, law in zip(draft.tokens, draft.sureness, laws(trial, head, text, draft), strict=True):
            share, (kind, group) = float(law[ids.index(token)]), divmod(sureness, kinds)
            low, high = ([0.0, *EDGES][group], [*EDGES, 1.0][group])
            assert low - NEAR <= share <= high + NEAR, (text, draft)
            assert kind != LIKELIEST or share >= float(law.max()) - NEAR
            count += 1
        assert len(set(zip(draft.parents, draft.tokens, strict=False))) == len(draft.parents)
    return count


@here
@pytest.mark.parametrize("width", [1, 3])
def test_a_draft_is_what_the_head_says_of_the_whole_text(width: int) -> None:
    trial = Trial(lively())
    head, count, preempted, known, wanted = head_of(trial), 0, 0, 0, 0
    for seed in range(3):
        who = drafter(trial, head, width)
        schedule = Schedule(seed, 40, 16, 4, 0.6, 5, force=0.2)
        made = trial.run(asked(seed, 6, "greedy"), schedule, who)
        assert not made.leaked
        preempted, known, wanted = preempted + made.preempted, known + len(who.notes), wanted + who.asked
        count += check(trial, head, random.Random(seed).sample(who.notes, 4))
        assert (width > 1) == any(len(draft.tokens) > depth for _, depth, draft in who.notes)
        held = list(who.following.room.held.values())
        assert who.following.room.blocks.room == 400 - len({block for one in held for block in one.blocks})
    assert preempted and count > 40 and known > 0.3 * wanted  # prompts part where a block ends: then one is left out


def not_cut_back(self: Noted, asks: Seq[Ask]) -> list[Draft]:
    """Rows of drafts are taken for rows of the text."""
    made = Noted.draft(self, asks)
    for ask, draft in zip(asks, made, strict=True):
        held, size = self.following.room.of(ask.sequence), len(ask.sequence.tokens)
        more = range(size - 1, size + len(draft.tokens) - 2)
        if draft.tokens and self.following.room.reserve(held, len(held.places) + len(more)):
            held.places += more
    return made


@here
def test_stale_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(lively())
    head = head_of(trial)
    for wrong in (False, True):
        who = drafter(trial, head, 1)
        who.every = wrong  # rows that are left out are another thing
        if wrong:
            monkeypatch.setattr(who, "draft", partial(not_cut_back, who))
        trial.run(asked(1, 4, "greedy"), Schedule(0, drafts=4), who)
        if wrong:
            with pytest.raises(AssertionError):
                check(trial, head, who.notes)
        else:
            assert check(trial, head, who.notes) > 10


@here
@pytest.mark.parametrize("way", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.2}])
def test_a_head_of_no_numbers_drafts_nothing(way: dict[str, Any]) -> None:
    trial = Trial(lively())
    head = head_of(trial)
    torch.nn.init.constant_(head.out.weight, torch.nan)
    who, request = drafter(trial, head, 3), [Request("a", tuple(range(10, 30)), Sampling(max_tokens=8, **way))]
    made = trial.run(request, Schedule(0), who)
    assert who.asked and not made.drafted and made.told() == trial.plain(request).told()


@here
def test_after_other_weights_a_text_is_theirs() -> None:
    """A head that was made for those before goes on, and has read what they made: no token depends on it."""
    trial = Trial(lively())
    first, later = asked(3, 4, "greedy"), [replace(one, id=f"later {one.id}") for one in asked(3, 4, "greedy")]
    before = trial.plain(first)
    engine, made = trial.engine(Schedule(0, drafts=4), drafter(trial, head_of(trial), 3)), Made()

    def work() -> None:
        with torch.no_grad():
            for weight in trial.model.parameters():
                weight.mul_(1.1)

    for one in first:
        engine.add(one)
    update = None
    while not engine.idle:
        for event in engine.step():
            made.events.setdefault((event.request, event.index), []).append(event)
        if update is None:
            update = engine.update(work)
            for one in later:
                engine.add(one)
    assert engine.version == 1 and engine.stats().drafted > 50
    assert made.told() == before.told() | trial.plain(later).told()
