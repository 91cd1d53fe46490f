"""Blocks by number and by name: who may find what, and what is taken first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmkit.inference.blocks import Blocks, chain, salted
from llmkit.inference.request import Request
from tests.inference.world import World, request

PROMPT = tuple(range(13))


def named(blocks: Blocks, *names: bytes) -> list[int]:
    taken = blocks.take(len(names))
    for block, name in zip(taken, names, strict=True):
        blocks.publish(block, name)
    return taken


def test_the_longest_run_of_a_prefix_is_found_and_the_longest_unused_goes_first() -> None:
    blocks = Blocks(4, 4)
    old = named(blocks, b"a", b"b")
    blocks.release(old)
    assert blocks.share([b"a", b"b", b"c"]) == old and blocks.room == 2
    assert blocks.share([b"c", b"b"]) == []  # a run begins at the beginning
    blocks.release(old)
    blocks.release(named(blocks, b"c", b"d"))
    assert blocks.take(1) == [old[1]]  # the end of the prefix that was used longest ago
    assert blocks.share([b"a", b"b"]) == old[:1]
    blocks.forget()
    assert blocks.share([b"a"]) == []


def test_more_than_there_is_is_refused_and_nobody_gives_back_what_he_has_not() -> None:
    blocks = Blocks(2, 4)
    with pytest.raises(ValueError, match="3 blocks are asked for, 2 are free"):
        blocks.take(3)
    blocks.release(blocks.take(1))
    with pytest.raises(ValueError, match="held by nobody"):
        blocks.release([0])


def test_a_name_stands_for_all_that_comes_before_and_for_whose_it_is() -> None:
    roots = {salted(*parts) for parts in (("a", "", "0"), ("b", "", "0"), ("a", "x", "0"), ("a", "", "1"))}
    roots |= {salted("ab", "c"), salted("a", "bc"), salted("abc")}
    assert len(roots) == 7
    one, two = salted("a"), salted("b")
    assert len({chain(root, tokens) for root in (one, two) for tokens in ((1, 2), (2, 1), (513,), (1, 2, 0))}) == 8
    assert chain(chain(one, (1, 2)), (3, 4)) != chain(chain(one, (5, 6)), (3, 4))


def test_names_of_another_process_are_others() -> None:
    code = "from llmkit.inference.blocks import chain, salted; print(chain(salted('a'), (1, 2)).hex())"
    said = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(said) == 2 and chain(salted("a"), (1, 2)).hex() not in {one.strip() for one in said}


def asked(world: World, one: Request) -> tuple[int, int]:
    """Tokens of a prompt that were found, and the steps to its first token."""
    world.add(one)
    sequence, steps = world.live[one.id][0], 0
    while one.id not in world.begun:
        world.step()
        steps += 1
    while one.id in world.live:
        world.step()
    return sequence.found, steps


def test_another_tenant_adapter_or_version_never_hits() -> None:
    world = World(blocks=64)
    assert asked(world, request("1", PROMPT, tenant="a")) == (0, 1)
    assert asked(world, request("2", PROMPT, tenant="a")) == (12, 1)
    assert asked(world, request("3", PROMPT, tenant="b"))[0] == 0
    assert asked(world, request("4", PROMPT, tenant="a", adapter="x"))[0] == 0
    assert asked(world, request("5", (9, *PROMPT[1:]), tenant="a"))[0] == 0
    world.swap()
    assert asked(world, request("6", PROMPT, tenant="a"))[0] == 0
    assert asked(world, request("7", PROMPT, tenant="a"))[0] == 12


def test_a_probe_takes_the_same_work_whatever_another_tenant_has_there() -> None:
    probes = []
    for warm in (False, True):
        world = World(blocks=64)
        if warm:
            asked(world, request("0", PROMPT * 3, tenant="victim"))
        world.took.clear()
        probes.append((asked(world, request("1", PROMPT * 3, tenant="spy")), world.took))
    assert probes[0] == probes[1]
