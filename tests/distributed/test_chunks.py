"""Parts of tensors come into whole ones, on the same ranks or on others, in messages of a bounded size."""

import gc

import pytest
import torch
import torch.distributed as dist

from llmkit.core.errors import PeerError
from llmkit.core.ranks import ranks
from llmkit.core.sliced import Slice, whole
from llmkit.parallel.chunks import Route
from llmkit.parallel.cuts import Cut, deal
from llmkit.parallel.cuts import joined as end_to_end
from llmkit.parallel.group import joined
from llmkit.rl.sync import Copied
from tests.distributed import together

FUSED = end_to_end([deal(2, 4, 2), deal(2, 1, 2, 8), deal(2, 1, 2, 10)])
"""Rows of four queries, a key and a value, two each: key and value lie on both of two ranks."""
TENSORS = {
    "blocks": torch.arange(7 * 6).reshape(7, 6).float(),
    "fused": torch.arange(12 * 3).reshape(12, 3).double(),
    "flat": torch.arange(3 * 5).reshape(3, 5).to(torch.bfloat16),
    "number": torch.tensor(3.0),
    "everyone's": torch.arange(5).float(),
}


def lying(rank, step=0):
    """What ranks 0 and 1 hold of them at a step."""

    def of(name):
        tensor = TENSORS[name] + step
        if name == "blocks":
            a, b = ((0, 4), (4, 7))[rank]
            return [Slice(tensor[a:b], (7, 6), (a, 0)), Slice(tensor[:0], (7, 6), (0, 0))]
        if name == "fused":
            cut = Cut((12, 3), 0, FUSED, rank)
            return cut.blocks(whole(cut.of(tensor)))
        if name == "flat":
            a, b = ((0, 8), (8, 15))[rank]
            return [Slice(tensor.reshape(-1)[a:b], (15,), (a,))]
        return [whole(tensor)]

    return of


def grouped(world, work, tmp_path):
    def each(rank):
        with joined(ranks(), "cpu") as peers:
            work(rank, peers)

    together(world, each, tmp_path)


@pytest.mark.parametrize(("world", "others"), [(2, False), (4, True)])
def test_parts_become_whole(world, others, tmp_path):
    """On the ranks that hold them, or on two that hold nothing; twice, with other numbers."""

    def work(rank, peers):
        holds, takes = rank < 2, rank > 1 or not others
        route = Route(peers, TENSORS if holds else (), lying(rank), takes, most=48)
        sizes = [message.numel * message.kind.itemsize for message in route.messages]
        assert max(sizes) <= 48
        assert len(sizes) >= 10
        sent = {part.name for message in route.messages for part in message.parts}
        assert sent == set(TENSORS) - (set() if others else {"number", "everyone's"})
        into = {name: torch.full_like(tensor, -1) for name, tensor in TENSORS.items()}
        for step in (0, 2):
            route.follow(lying(rank, step), into, "cpu")
            for name, tensor in TENSORS.items():
                assert torch.equal(into[name], tensor + step if takes else torch.full_like(tensor, -1)), name

    grouped(world, work, tmp_path)


def test_what_is_not_whole_is_told(tmp_path):
    def work(rank, peers):
        with pytest.raises(ValueError, match="not the whole of it"):
            Route(peers, ["gap"], lambda _: [Slice(torch.zeros(2), (5,), (2 * rank,))])

    grouped(2, work, tmp_path)


def test_versions_do_not_mix(tmp_path):
    def work(rank, peers):
        into = {name: torch.full_like(tensor, -1) for name, tensor in TENSORS.items()}
        move = Copied(peers, lying(rank), into, "cpu", Route(peers, TENSORS, lying(rank)))
        move(3)
        with pytest.raises(PeerError, match=r"rank 1 .* version 5 .* rank 0 .* from 4"):
            move(4 + rank)

    grouped(2, work, tmp_path)


def held():
    """Bytes of all tensors that were made since `gc.freeze`, each memory once."""
    found = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter):  # what is cut has its part as one of these
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(found.values())


def test_no_more_than_a_chunk_is_held_beside(tmp_path):
    def work(rank, peers):
        own = {f"layer {i}": torch.full((64, 128), float(i + rank)) for i in range(20)}
        into = {name: torch.zeros(128, 128) for name in own}

        def parts(name):
            return [Slice(own[name], (128, 128), (64 * rank, 0))]

        route, most, real = Route(peers, own, parts, most=4096), [], dist.broadcast
        gc.freeze()  # all that is there is not counted

        def broadcast(room, *more, **named):
            real(room, *more, **named)
            most.append(held())

        dist.broadcast = broadcast
        route.follow(parts, into, "cpu")
        dist.broadcast = real
        assert len(most) == 20 * 16
        assert min(most) >= 4096
        assert max(most) <= 2 * 4096  # a message, and the last one, which gloo may still hold
        assert all(float(into[f"layer {i}"].sum()) == 64 * 128 * (2 * i + 1) for i in range(20))

    grouped(2, work, tmp_path)
