"""Drafts by a trained head over the model's own hidden states (EAGLE-3, arXiv:2503.01840): chains and trees.

What the head read of a text are rows of (token, hidden state of the place before it), all of them of tokens that were
chosen; those of drafts are made of its own output and lie after them in its cache, where the next true ones come.
Places whose hidden states nobody made (the model found them in its cache, and the head not in its own) are left out:
the others keep their positions, and attention is over those alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from llmkit.core.types import Paged, Span
from llmkit.inference.ranks import Store
from llmkit.inference.runner import Rows
from llmkit.inference.scheduler import Chunk
from llmkit.inference.sequence import Sequence
from llmkit.inference.speculation.drafter import Ask, Draft
from llmkit.inference.speculation.followed import Followed, Following
from llmkit.inference.speculation.growth import CLASSES, Growth, Tip, next_tips
from llmkit.inference.speculation.pile import Entry, Pile

PILE = 1024
"""Rows that are kept unread between two drafts, about. Where more come, such as of a long prompt, the head reads them,
part by part, but where tokens are made that it is not asked to draft for: so one that is not worth its time takes none.
"""

FEW = 8
"""Rows of prompts that are read with the others."""


class HeadForward(Protocol):
    """A head as the engine sees it."""

    ids: list[int]
    """The model's words that its own stand for, rising."""

    @property
    def device(self) -> torch.device:
        """Where tokens are put."""
        ...

    def features(self, states: Seq[Tensor]) -> Tensor:
        """The model's hidden states (N, H) of several layers -> (N, H)."""
        ...

    def forward(self, tokens: Tensor, features: Tensor, positions: Tensor, attend: Paged) -> Tensor:
        """Tokens (N,) after the features (N, H) of positions (N,) -> (N, H)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V) over its words, in fp32 on the host."""
        ...


class Head:
    """A `Drafter` that watches the model."""

    classes, free = CLASSES, False

    def __init__(
        self,
        forward: HeadForward,
        store: Store,
        states: Callable[[], list[Tensor]],
        words: int,
        width: int = 1,
        floor: float = 0.05,
    ) -> None:
        """`states`: those of the model's newest step. `words`: of the model. `width`: paths that are drafted on at each
        depth. `floor`: the probability of a path under which it is not drafted on: a level takes some hundredths of a
        step."""
        self.forward, self.store, self.words, self.width, self.floor = forward, store, words, width, floor
        self.pile, self.following = Pile(states), Following(store.blocks, store.size, store.copy)
        self.drafted = self.wanted = True
        """Whether it was asked for drafts since the last step, and whether it is where tokens are made."""

    def see(self, chunks: Seq[Chunk], rows: Seq[Rows]) -> None:
        """The hidden states of these are read when the next draft is asked for."""
        self.wanted = self.drafted or (self.wanted and not any(map(_makes, chunks)))
        self.drafted = False
        if self.pile.rows > PILE:
            if self.wanted:
                self._read([])
            self.pile.clear()
        self.pile.add(chunks)

    def read(self, asks: Seq[Ask]) -> None:
        """A prompt, if one came: what a step with drafts leaves is read in drafting."""
        if self.pile.prompts > FEW:
            self._read([ask.sequence for ask in asks])

    @torch.no_grad()
    def draft(self, asks: Seq[Ask]) -> list[Draft]:
        """One for each."""
        self.drafted = True
        self.following.room.turn += 1
        followed = self._read([ask.sequence for ask in asks])
        growths = [self._opened(ask, followed[ask.sequence]) for ask in asks]
        self._grow([one for one in growths if one is not None])
        return [Draft() if one is None else one.best() for one in growths]

    def _read(self, wanted: Seq[Sequence]) -> Mapping[Sequence, Followed]:
        """Reads what was seen; what there is then of all that is `wanted` or was seen."""
        found, states = self.pile.take()
        held: dict[Sequence, Followed] = {}
        new: list[tuple[Sequence, list[Entry]]] = []
        for one in dict.fromkeys([*found, *wanted]):
            held[one], entries = self.following.of(one, found)
            held[one].turn = self.following.room.turn
            new.append((one, entries))
        self._feed([(one, entries) for one, entries in new if entries and self._fits(held[one], entries)], states)
        return held

    def _fits(self, held: Followed, entries: Seq[Entry]) -> bool:
        """Whether there is room for these; all that was before is given up for them if need be, or they are."""
        room = self.following.room
        if room.reserve(held, len(held.places) + len(entries)):
            return True
        room.leave(held)
        held.at = entries[-1][0] + 1
        return room.reserve(held, len(entries))

    @torch.no_grad()
    def _feed(self, new: Seq[tuple[Sequence, list[Entry]]], states: Seq[Tensor]) -> None:
        if not new:
            return
        tokens: list[int] = []
        places: list[int] = []
        rows: list[int] = []
        spans: list[Span] = []
        for one, entries in new:
            held, start = self.following.room.of(one), len(tokens)
            tokens += [one.tokens[place + 1] for place, _ in entries]
            places += [place for place, _ in entries]
            rows += [row for _, row in entries]
            spans.append(Span(0, start, len(tokens), len(held.places), tuple(held.blocks)))
        used = torch.tensor(rows)
        features = self.forward.features([state.index_select(0, used.to(state.device)) for state in states])
        hidden = self._run(tokens, features, places, spans)
        for (one, entries), span in zip(new, spans, strict=True):
            self.following.note(one, entries, hidden[span.end - 1].clone())

    def _run(self, tokens: Seq[int], features: Tensor, places: Seq[int], spans: Seq[Span]) -> Tensor:
        there, at = torch.tensor([tokens, places]).to(self.forward.device)
        return self.forward.forward(there, features, at, Paged(self.store, tuple(spans)))

    def _opened(self, ask: Ask, held: Followed) -> Growth | None:
        """Where the draft of a sequence begins; nothing where the hidden state before its newest token is not known."""
        one, room = ask.sequence, self.following.room
        if not ask.count or held.tip is None or held.at != len(one.tokens) - 1:
            return None
        if not room.reserve(held, len(held.places) + ask.count):
            return None
        whole = len(held.places) // room.size
        fill, own = len(held.places) - whole * room.size, held.blocks[whole:]
        growth = Growth(ask, self.width, self.floor, tuple(held.blocks[:whole]), fill, [own])
        while len(growth.tails) < growth.width and room.free(len(own)):
            growth.tails.append(room.blocks.take(len(own)))
        return growth

    def _grow(self, growths: Seq[Growth]) -> None:
        """Level by level, all sequences in one forward each."""
        tips = [(one, Tip()) for one in growths]
        ends = [self.following.room.of(one.ask.sequence).tip for one in growths]
        hidden = torch.stack([end for end in ends if end is not None]) if ends else None
        try:
            while tips and hidden is not None:
                logits = self.forward.logits(hidden)
                tips, parents = next_tips(tips, logits, self.forward.ids, self.words)
                hidden = self._deeper(tips, hidden, parents) if tips else None
        finally:
            for one in growths:
                for tail in one.tails[1:]:
                    self.following.room.blocks.release(tail)

    def _deeper(self, tips: Seq[tuple[Growth, Tip]], hidden: Tensor, parents: Seq[int]) -> Tensor:
        """What the head makes of drafts after its own output `hidden`, of the rows `parents`."""
        size = self.store.size
        moves = [pair for one in dict.fromkeys(one for one, _ in tips) for pair in one.moves(size)]
        if moves:
            self.store.move([source for source, _ in moves], [target for _, target in moves])
        spans = [
            Span(0, at, at + 1, len(one.whole) * size + one.fill + tip.depth - 1, one.blocks(tip.branch))
            for at, (one, tip) in enumerate(tips)
        ]
        tokens = [tip.token for _, tip in tips]
        places = [len(one.ask.sequence.tokens) + tip.depth - 2 for one, tip in tips]
        return self._run(tokens, hidden[torch.tensor(parents, device=hidden.device)], places, spans)


def _makes(chunk: Chunk) -> bool:
    """Whether a token that could be drafted for comes of it, and not the first after a prompt."""
    asked = chunk.sequence.request.sampling
    return chunk.last and chunk.sequence.made > 0 and asked.beams == 1 and asked.drafts != 0
