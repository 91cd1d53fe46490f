"""NEFTune: how much noise, where, when, and that it is the same again."""

import torch

from llmkit.core.seed import reseed
from llmkit.core.types import Batch, Packed, Segment, Tree
from llmkit.models.attend import install
from llmkit.models.heads import Scored
from llmkit.models.lengths import lengths as lengths_of
from tests.conftest import make_model


def seen(scored):
    """What the first layer is given."""
    kept = []
    layer = scored.causal[0].model.layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args, kwargs: kept.append(args[0]), with_kwargs=True)
    return kept, handle


def batch(packed=True):
    tokens = torch.arange(3, 33)[None] if packed else torch.arange(3, 43).view(2, 20)
    positions = torch.cat([torch.arange(4), torch.arange(26)])[None] if packed else torch.arange(20).repeat(2, 1)
    weights = torch.ones(tokens.shape)
    context = Packed((Segment(0, 0, 4), Segment(0, 4, 30))) if packed else None
    return Batch(tokens, positions, tokens, weights, context, (0, 1), () if packed else (20, 5))


def test_noise_is_bounded_by_each_sequences_own_length_and_fills_the_bound():
    model = make_model()
    install(model, "sdpa")
    scored, plain = Scored(model).train(), model.get_input_embeddings().weight.detach().clone()
    scored.disturb(5.0)
    kept, _ = seen(scored)
    for packed, lengths in ((True, [(slice(0, 4), 4), (slice(4, 30), 26)]), (False, [(slice(0, 20), 20)])):
        kept.clear()
        here = batch(packed)
        reseed(0, 1, 0)
        scored(here)
        off = (kept[0] - plain[here.tokens]).detach()
        for where, length in lengths:
            bound = 5.0 / (length * 32) ** 0.5
            part = off[0, where]
            assert 0.9 * bound < part.abs().max() <= bound
            assert abs(float(part.square().mean()) - bound**2 / 3) < 0.2 * bound**2
    assert off[1, :5].abs().max() > 0 and off[1, 5:].abs().max() == 0  # padding gets none


def test_it_is_drawn_anew_by_the_seed_of_the_micro_batch_and_only_in_training():
    model = make_model()
    install(model, "sdpa")
    scored = Scored(model)
    quiet = scored.eval()(batch())
    scored.disturb(5.0)
    assert torch.equal(scored(batch()), quiet)
    scored.train()
    outs = []
    for micro_batch in (0, 0, 1):
        reseed(7, 3, micro_batch)
        outs.append(scored(batch()))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], quiet)
    model(input_ids=batch().tokens)  # outside of a batch of ours nothing is added
    assert torch.equal(
        model.get_input_embeddings()(batch().tokens), model.get_input_embeddings().weight[batch().tokens]
    )


def test_a_branch_is_as_long_as_what_it_goes_on_from_and_itself():
    tree = Tree(
        (Segment(0, 0, 4), Segment(0, 4, 9, 0), Segment(0, 9, 11, 0), Segment(0, 11, 12, 2), Segment(0, 12, 15))
    )
    none = torch.zeros(1, 16).long()
    made = lengths_of(Batch(none, none, none, torch.ones(1, 16), tree, (0,)))
    assert made[0].tolist() == [4.0] * 4 + [9.0] * 5 + [6.0] * 2 + [7.0] + [3.0] * 3 + [0.0]
