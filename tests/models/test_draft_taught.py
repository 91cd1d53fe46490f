"""What a head is trained on is what it drafts by: step k of its training is its k-th draft over a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.core.types import Batch, Drafted, Packed, Paged, Segment, Span
from llmkit.losses.draft_node import Overlap, SoftEntropy
from llmkit.losses.drafting import overlap, soft_entropy
from llmkit.models.attend import install
from llmkit.models.draft_head import DraftHead, shape_for
from llmkit.models.draft_tapped import tapped
from llmkit.models.draft_taught import Taught
from llmkit.models.families import tiny
from llmkit.models.foretold import foretold, kept
from llmkit.models.memo import Memo
from llmkit.models.paged import BlockStore
from tests.conftest import make_model

STEPS = 3


def taught(folder: Path, model: Any = None, words: int = 40, rule: Any = soft_entropy, steps: int = STEPS) -> Taught:
    model = model or make_model(num_hidden_layers=3)
    torch.manual_seed(1)
    ids = torch.randperm(model.config.vocab_size)[:words].sort().values
    head = DraftHead(shape_for(model, words), model.get_input_embeddings(), ids)
    width = (len(head.taps)) * head.shape.width
    return Taught(model, head, steps, rule, Memo(folder / "features", width, "one"))


def batch(*texts: tuple[list[int], list[float]]) -> Batch:
    """Packed texts: ids, and the weight of each token as a target."""
    tokens, labels, weights, positions, segments = [], [], [], [], []
    for ids, weighs in texts:
        segments.append(Segment(0, len(tokens), len(tokens) + len(ids)))
        tokens += ids
        labels += [*ids[1:], 0]
        weights += [*weighs[1:], 0.0]
        positions += range(len(ids))
    parts = [torch.tensor([part]) for part in (tokens, positions, labels)]
    return Batch(parts[0], parts[1], parts[2], torch.tensor([weights]), Packed(tuple(segments)), (0, 1))


def text(length: int, prompt: int, seed: int, words: int = 448) -> tuple[list[int], list[float]]:
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, words, (length,), generator=made).tolist()
    return ids, [0.0] * prompt + [1.0] * (length - prompt)


def drafted_one_by_one(one: Taught, ids: list[int], row: int, steps: int) -> list[torch.Tensor]:
    """The logits of drafts after `row`, over a cache: the true rows up to it, then the head's own, fed the text."""
    head, store = one.head, BlockStore(8, 8)
    states = one.states(torch.tensor(ids)).unflatten(-1, (len(one.taps), -1))
    features = head.features(states[: row + 1, : len(head.taps)].unbind(1))
    blocks, made = tuple(range(8)), list[torch.Tensor]()
    past, feed, read = 0, torch.tensor(ids[1 : row + 2]), features
    for step in range(steps):
        span = Span(0, 0, len(feed), past, blocks)
        hidden = head(feed, read, torch.arange(past, past + len(feed)), Paged(store, (span,)))
        made.append(head.logits(hidden[-1:])[0])
        past += len(feed)
        feed, read = torch.tensor(ids[row + 2 + step : row + 3 + step]), hidden[-1:]
    return made


@torch.no_grad()
def test_a_step_of_training_is_a_draft_over_a_cache(tmp_path: Path) -> None:
    one = taught(tmp_path)
    texts = [text(14, 5, 2), text(11, 4, 3)]
    seen: list[torch.Tensor] = []
    one._foretold = lambda told, places, hidden: (
        seen.append(one.head.logits(hidden)),
        *(hidden.sum(), hidden.sum(), hidden.sum(), one.head.logits(hidden).argmax(1)),
    )[1:]
    made = one(batch(*texts))
    compared = 0
    for step in range(STEPS):
        alive = [
            (which, row)
            for which, (ids, weights) in enumerate(texts)
            for row in range(len(ids))
            if row + 2 + step < len(ids) and all(weights[row + 2 : row + 3 + step])
        ]
        assert len(alive) == len(seen[step])
        for (which, row), logits in zip(alive, seen[step], strict=True):
            wanted = drafted_one_by_one(one, texts[which][0], row, step + 1)[step]
            assert torch.allclose(logits, wanted, atol=2e-5)
            compared += 1
    assert compared > 40
    assert made.rows.tolist() == [*range(3, 12), *(14 + row for row in range(2, 9))]


@torch.no_grad()
def test_losses_laws_and_what_is_right_are_those_of_each_row(tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=3)
    one = taught(tmp_path, model, words=448)
    ids, weights = text(12, 4, 5)
    first = drafted_one_by_one(one, ids, 2, 1)[0].argmax()
    ids[4] = int(one.head.ids[first])  # one draft is right
    made: Drafted = one(batch((ids, weights)))
    law = torch.softmax(model(torch.tensor([ids])).logits[0], -1)[:, one.head.ids]
    losses, kept, right = 0.0, 0.0, []
    for row in range(2, 10):
        q = drafted_one_by_one(one, ids, row, 1)[0].log_softmax(0)
        losses -= float((law[row + 1] * q).sum())
        kept += float(torch.minimum(law[row + 1], q.exp()).sum())
        right.append(int(one.head.ids[q.argmax()]) == ids[row + 2])
    assert float(made.losses[0]) == pytest.approx(losses, rel=5e-3)  # the model's hidden states are kept in bfloat16
    assert float(made.kept[0]) == pytest.approx(kept, rel=5e-3)
    assert [float(count) for count in made.counts] == [8.0, 7.0, 6.0]
    assert made.right[:, 0].tolist() == right
    assert right[0]
    assert not (made.right[:, 1:] & ~made.right[:, :-1]).any()


@pytest.mark.parametrize("loss", [SoftEntropy(decay=0.5), Overlap(decay=0.5)], ids=["entropy", "overlap"])
def test_the_gradient_made_with_the_loss_is_that_of_the_plain_form(loss: Any, tmp_path: Path) -> None:
    rows, words, width = 300, 17, 5  # more rows than a block
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=made, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(words, width, generator=made, dtype=torch.float64, requires_grad=True)
    laws = torch.softmax(2 * torch.randn(40, words, generator=made, dtype=torch.float64), 1)
    at, weights = torch.randint(0, 40, (rows,), generator=made), torch.rand(rows, generator=made, dtype=torch.float64)
    total, common, best = foretold(hidden, weight, None, kept(lambda here: laws[at[here]], loss.rule), weights)
    ours = torch.autograd.grad(total * 3, (hidden, weight))
    q = torch.log_softmax(hidden @ weight.T, 1)
    shared = torch.minimum(q.exp(), laws[at]).sum(1)
    plain = -(laws[at] * q).sum(1) if isinstance(loss, SoftEntropy) else -shared.log()
    assert torch.allclose(total, (plain * weights).sum())
    theirs = torch.autograd.grad((plain * weights).sum() * 3, (hidden, weight))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))
    assert torch.allclose(common, shared)
    assert torch.equal(best, q.argmax(1))
    three = Drafted((total, total * 2), (weights.sum(),) * 2, (common.sum(),) * 2, at, at > 0)
    told = loss(three, Batch(at, at, at, weights, None, ()))
    assert torch.allclose(told.total, total * (1 + 0.5 * 2) / 1.5)


def test_a_closed_form() -> None:
    law, logits = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert soft_entropy(logits, law)[0].item() == pytest.approx(1.3862944)
    assert overlap(logits, law)[0].item() == pytest.approx(0.6931472)
    assert soft_entropy(logits, law)[1].tolist()[0] == pytest.approx([-0.25, -0.25, 0.5])
    assert overlap(law.log().clamp_min(-99), law)[0].item() == pytest.approx(0.0, abs=1e-6)


def test_nothing_of_the_model_learns_and_all_of_the_head_does(tmp_path: Path) -> None:
    one = taught(tmp_path)
    one.model.requires_grad_(False)
    SoftEntropy()(one(batch(text(20, 4, 7))), batch(text(20, 4, 7))).total.backward()
    assert all(p.grad is None for p in one.model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in one.head.parameters())


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPT-2", "Gemma-2"])
@torch.no_grad()
def test_taps_are_the_hidden_states_as_transformers_numbers_them(family: str) -> None:
    model = tiny(family).eval()
    ids = torch.arange(3, 12)
    install(model, "auto")
    wanted = model.base_model(ids[None], output_hidden_states=True).hidden_states
    for tap, found in zip((1, 2), tapped(model, ids, (1, 2)), strict=True):
        assert torch.allclose(found, wanted[tap][0], atol=1e-4)


def test_what_was_made_is_not_made_again_unless_it_was_hurt(tmp_path: Path) -> None:
    one = taught(tmp_path)
    ids = torch.tensor(text(9, 3, 1)[0])
    first, asked = one.states(ids), []
    one.model.base_model.register_forward_hook(lambda *_: asked.append(1))
    assert torch.equal(one.states(ids), first)
    assert torch.equal(taught(tmp_path, one.model).states(ids), first)
    assert not asked
    with (tmp_path / "features").open("r+b") as file:
        file.write(b"\x01\x02\x03")
    again = taught(tmp_path, one.model)
    assert torch.equal(again.states(ids), first)
    assert asked == [1]
    Memo(tmp_path / "features", again.memo.width, "another")
    assert taught(tmp_path, one.model).memo.known == {}
    again.memo.remove()
    assert list(tmp_path.iterdir()) == []
