"""A head that learned a model's answers drafts them in the engine as well as it did in its training."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llmkit_kernels.build import lacks

from llmkit.cli.speculation.tiny import lively
from llmkit.cli.speculation.trial import SIZE, Made, Schedule, Trial
from llmkit.core.types import Batch, Packed, Segment
from llmkit.inference.request import Request
from llmkit.inference.sampling import Sampling
from llmkit.inference.speculation import head as heads
from llmkit.inference.speculation.drafter import Draft
from llmkit.inference.speculation.head import Head
from llmkit.inference.speculation.pile import Seen
from llmkit.losses.drafting import soft_entropy
from llmkit.models.draft_head import DraftHead, shape_for
from llmkit.models.draft_run import HeadRun
from llmkit.models.draft_taught import Taught
from llmkit.models.memo import Memo
from llmkit.models.paged import BlockStore
from llmkit.models.taps import Taps

here = pytest.mark.skipif(bool(lacks("linear") or lacks("paged")), reason=lacks("linear") or lacks("paged"))
DEPTH, LENGTH, PROMPT = 4, 20, 5


def requests(count: int, **how: Any) -> list[Request]:
    drawn = torch.Generator().manual_seed(5)
    prompts = torch.randint(10, 50, (count, PROMPT), generator=drawn).tolist()
    sampling = Sampling(**{"max_tokens": LENGTH, "temperature": 0.0, "ignore_eos": True, **how})
    return [Request(str(at), tuple(prompt), sampling) for at, prompt in enumerate(prompts)]


def packed(texts: Seq[Seq[int]]) -> Batch:
    size = PROMPT + LENGTH
    tokens = torch.tensor([[token for text in texts for token in text]])
    labels = torch.tensor([[token for text in texts for token in [*text[1:], 0]]])
    weights = torch.tensor([[*[0.0] * (PROMPT - 1), *[1.0] * LENGTH, 0.0] * len(texts)])
    segments = tuple(Segment(0, at * size, (at + 1) * size) for at in range(len(texts)))
    return Batch(tokens, torch.tensor([[*range(size)] * len(texts)]), labels, weights, Packed(segments), (0,))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: Any) -> tuple[Trial, Made, DraftHead, list[list[int]]]:
    """A model, what it answers, a head that learned that, and of each answer by each row how many drafts are right."""
    trial = Trial(lively())
    plain = trial.plain(requests(4))
    torch.manual_seed(0)
    head = DraftHead(shape_for(trial.model, trial.words), trial.decoder.causal.get_input_embeddings())
    memo = Memo(Path(tmp_path_factory.mktemp("memo")) / "features", 2 * head.shape.width, "one")
    one = Taught(trial.model, head, DEPTH, soft_entropy, memo)
    texts = [[*request.prompt, *plain.tokens((request.id, 0))] for request in requests(4)]
    batch, optimiser = packed(texts), torch.optim.Adam(head.parameters(), 6e-3)
    for _ in range(160):
        optimiser.zero_grad()
        (sum(one(batch).losses) / len(batch.tokens[0])).backward()
        optimiser.step()
    made = one(batch)
    kept_of = [[0] * (PROMPT + LENGTH) for _ in texts]
    for row, kept in zip(made.rows.tolist(), made.right.sum(1).tolist(), strict=True):
        kept_of[row // (PROMPT + LENGTH)][row % (PROMPT + LENGTH)] = kept
    return trial, plain, head, kept_of


def run(trial: Trial, head: DraftHead, asked: Seq[Request], width: int = 1, **how: Any) -> Made:
    states, schedule = Taps(trial.decoder.causal, head.taps).take, Schedule(0, drafts=DEPTH, **how)
    who = Head(HeadRun(head, trial.decoder.device), BlockStore(300, SIZE), states, trial.words, width, 0.0)
    return trial.run(asked, schedule, who)


@here
def test_it_is_right_as_often_as_in_its_training(learned: Any) -> None:
    trial, plain, head, rows_right = learned
    made = run(trial, head, requests(4))
    assert made.told() == plain.told()
    kept = tried = 0
    for rows in rows_right:  # the engine's walk over each answer, by what training says of each row
        said = 1
        while said < LENGTH:
            left = min(DEPTH, LENGTH - said - 1)
            came = min(rows[PROMPT + said - 2], left)
            kept, tried, said = kept + came, tried + left, said + came + 1
    assert kept > 0.85 * tried
    assert abs(made.accepted - kept) <= 0.03 * kept
    assert abs(made.drafted - tried) <= 0.03 * tried


def right(made: Made) -> float:
    """Drafts that came, of all."""
    return made.accepted / made.drafted


TWICE = [*requests(4), *(replace(one, id=f"again {one.id}") for one in requests(4))]
HOWS: dict[str, tuple[list[Request], dict[str, Any]]] = {
    "in chunks": (requests(4), {"tokens": 7}),
    "one by one": (requests(4), {"sequences": 1}),
    "preempted": (requests(4), {"force": 0.3}),
    "a prompt that is known": (TWICE, {"sequences": 2, "coming": 0.3}),
    "three answers": (requests(4, n=3), {"sequences": 6}),
    "a rule": (requests(4, logit_bias={9: -1.0}), {}),
}


@here
@pytest.mark.parametrize("name", HOWS)
def test_it_is_right_whatever_happens(learned: Any, name: str) -> None:
    """Nothing that it read is stale, or stands elsewhere than it should."""
    trial, _, head, _ = learned
    asked, how = HOWS[name]
    made = run(trial, head, asked, **how)
    assert made.drafted > 40
    assert right(made) > 0.97 * right(run(trial, head, requests(4)))


@here
def test_a_tree_is_right_more_often(learned: Any) -> None:
    trial, plain, head, _ = learned
    chain, tree = (run(trial, head, requests(4), width) for width in (1, 3))
    assert tree.told() == plain.told()
    assert tree.accepted >= chain.accepted


def row_before(patch: Any) -> None:
    """A hidden state is that of the token before."""
    entries = Seen.entries
    patch.setattr(Seen, "entries", lambda self: [(at, max(0, row - 1)) for at, row in entries(self)])


def only_the_last(patch: Any) -> None:
    """Hidden states of all but the newest token are lost."""
    entries = Seen.entries
    patch.setattr(Seen, "entries", lambda self: entries(self)[-1:])


@here
@pytest.mark.parametrize("plant", [row_before, only_the_last])
def test_a_defect_is_found(learned: Any, plant: Any, monkeypatch: Any) -> None:
    """The text stays what it is; it is the drafts that are right less often."""
    trial, plain, head, _ = learned
    usual = right(run(trial, head, requests(4)))
    plant(monkeypatch)
    made = run(trial, head, requests(4))
    assert made.told() == plain.told()
    assert right(made) < 0.9 * usual


@here
def test_what_waits_to_be_read_is_bounded(learned: Any, monkeypatch: Any) -> None:
    """It is read in time where something is drafted, and let go of where nothing is."""
    trial, _, head, _ = learned
    usual = right(run(trial, head, requests(4)))
    monkeypatch.setattr(heads, "PILE", 8)
    assert right(run(trial, head, requests(4))) > 0.97 * usual
    rows: list[int] = []
    see = Head.see
    monkeypatch.setattr(Head, "see", lambda self, *given: (see(self, *given), rows.append(self.pile.rows)))
    monkeypatch.setattr(Head, "draft", lambda self, asks: [Draft() for _ in asks])
    run(trial, head, requests(4), tokens=7)
    assert max(rows) <= 8 + 7 and sum(rows) > 60


@here
def test_a_long_prompt_is_read_in_parts_and_none_of_it_left_out(learned: Any, monkeypatch: Any) -> None:
    trial, _, head, _ = learned
    monkeypatch.setattr(heads, "PILE", 8)
    opened, whole = Head._opened, list[bool]()

    def noted(self: Head, ask: Any, held: Any) -> Any:
        whole.append(held.places == [*range(len(ask.sequence.tokens) - 1)])
        return opened(self, ask, held)

    monkeypatch.setattr(Head, "_opened", noted)
    asked = [replace(one, prompt=one.prompt * 6) for one in requests(3)]
    made = run(trial, head, asked, tokens=7, sequences=1)
    assert made.drafted and len(whole) > 9 and all(whole)


@here
def test_a_prompt_is_read_before_drafting_is_timed(learned: Any, monkeypatch: Any) -> None:
    trial, _, head, _ = learned
    asked = [replace(one, prompt=one.prompt * 8) for one in requests(4)]
    draft, rows = Head.draft, list[int]()
    monkeypatch.setattr(Head, "draft", lambda self, asks: (rows.append(self.pile.rows), draft(self, asks))[1])
    plain, made = trial.plain(asked), run(trial, head, asked, coming=0.5)
    assert made.told() == plain.told() and made.drafted > 40
    assert max(rows) < 39 and min(rows) == 0 < sum(rows)
