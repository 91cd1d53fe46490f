"""Turns: what a step holds, who comes first, who gives way, and that it costs the same however many wait."""

from __future__ import annotations

import sys
from itertools import pairwise
from random import Random

import pytest

from llmkit.inference.blocks import Blocks
from llmkit.inference.fair import ABOUT, rank
from llmkit.inference.planner import plan
from llmkit.inference.scheduler import Chunk, Limits, Scheduler
from llmkit.inference.sequence import Sequence
from tests.inference.world import World, request


def parts(world: World) -> list[tuple[str, int]]:
    """What the next step has: request and number of tokens."""
    return sorted((c.sequence.request.id, c.end - c.start) for c in world.step().chunks)


def test_a_step_has_next_tokens_and_half_of_it_is_kept_for_prompts() -> None:
    world = World(blocks=200, limits=Limits(tokens=8, sequences=8))
    for id in "abcdef":
        world.add(request(id, (1,), max_tokens=40))
    assert parts(world) == [(id, 1) for id in "abcdef"]
    world.add(request("long", tuple(range(20)), max_tokens=2))
    while world.live["long"][0].made == 0:
        made = parts(world)
        assert sum(n for _, n in made) == 8 and len(made) == 5  # four next tokens, four of the prompt
    assert parts(world) == [*((id, 1) for id in "abcdef"), ("long", 1)]


def test_within_a_tenant_the_least_priority_number_is_first_then_who_came_first() -> None:
    world = World(blocks=200, limits=Limits(tokens=4, sequences=1))
    for id, priority in (("late", 0), ("low", 1), ("high", -1)):
        world.add(request(id, (1, 2), max_tokens=1, priority=priority))
    world.add(request("last", (1, 2), max_tokens=1))
    assert [parts(world)[0][0] for _ in range(4)] == ["high", "late", "last", "low"]


def test_one_of_a_higher_priority_takes_a_place_of_its_tenant_s_own() -> None:
    world = World(blocks=200, limits=Limits(tokens=8, sequences=2))
    for id in "ab":
        world.add(request(id, (1, 2), max_tokens=9, priority=1))
    world.step()
    world.add(request("now", (1, 2), max_tokens=2))
    assert [id for id, _ in parts(world)] == ["a", "now"]
    while "b" in world.live:
        world.step()
    assert world.scheduler.counts.preempted == 1


def test_deadlines_drop_what_waits_unexecuted_and_end_what_runs() -> None:
    world = World(blocks=200, limits=Limits(tokens=8, sequences=1))
    world.add(request("runs", (1, 2), max_tokens=9, deadline=5.0))
    world.add(request("waits", (1, 2), max_tokens=9, deadline=2.0))
    world.add(request("stays", (1, 2), max_tokens=1))
    world.step()
    world.now = 2.0
    assert [one.request.id for one in world.step().late] == ["waits"]
    assert world.scheduler.counts.dropped == 1 and "waits" not in world.begun
    world.now = 5.0
    step = world.step()
    assert [one.request.id for one in step.late] == ["runs"] and step.chunks[0].sequence.request.id == "stays"
    assert world.scheduler.counts.dropped == 1 and world.scheduler.blocks.room == 200


def test_tenants_get_tokens_by_their_weights() -> None:
    world = World(blocks=400, limits=Limits(16, 8, {"b": 3.0}))
    given = {"a": 0, "b": 0}
    for at in range(800):
        for tenant in "ab":
            if sum(one[0].request.tenant == tenant for one in world.live.values()) < 20:
                world.add(request(f"{tenant}{at}", tuple(Random(at).choices(range(9), k=12)), 6, tenant=tenant))
        for chunk in world.step().chunks:
            given[chunk.sequence.request.tenant] += chunk.end - chunk.start
    assert 2.8 < given["b"] / given["a"] < 3.2


def test_turns_are_not_saved_up() -> None:
    world = World(blocks=400, limits=Limits(16, 4))
    for at in range(40):  # alone, for long
        world.add(request(f"a{at}", (at,) * 9, 12, tenant="a"))
    while len(world.live) > 20:
        world.step()
    for at in range(40):
        world.add(request(f"b{at}", (at,) * 9, 12, tenant="b"))
    given = {"a": 0, "b": 0}
    for _ in range(60):
        for chunk in world.step().chunks:
            given[chunk.sequence.request.tenant] += chunk.end - chunk.start
    assert 0.7 < given["a"] / given["b"] < 1.4


def test_who_has_more_than_its_share_gives_way_and_takes_nothing_back() -> None:
    world = World(blocks=400, limits=Limits(32, 4))
    for at in range(8):
        world.add(request(f"a{at}", (at,) * 4, 60, tenant="a"))
    world.step()
    for at in range(8):
        world.add(request(f"b{at}", (at,) * 4, 60, tenant="b"))
    for _ in range(20):
        world.step()
        assert [one.request.tenant for one in sorted(world.scheduler.running, key=rank)] == list("aabb")
    assert world.scheduler.counts.preempted == 2


def test_who_fills_the_cache_gives_way_too() -> None:
    world = World(blocks=40, limits=Limits(32, 8))
    for at in range(3):
        world.add(request(f"a{at}", (at,) * 40, 20, tenant="a"))
    for _ in range(9):
        world.step()
    assert world.scheduler.blocks.room <= 10  # a prompt's chunk of eight and one for each that runs do not fit
    world.add(request("b", (9,) * 40, 4, tenant="b"))
    while "b" not in world.begun:
        world.step()
    assert len(world.live) == 4 and world.now == 0.0  # before any of the others has ended


def test_the_first_one_ends_whatever_comes() -> None:
    world = World(blocks=12, size=4, limits=Limits(4, 4))
    world.add(request("old", tuple(range(36)), 8, tenant="a"))
    world.step()
    old, steps = world.live["old"][0], 0
    while "old" in world.live:
        for tenant in "bcd":
            world.add(request(f"{tenant}{steps}", (steps,) * 9, 4, tenant=tenant))
        world.step()
        assert old in world.scheduler.running or "old" not in world.live
        steps += 1
        assert steps < 200


def test_a_draft_that_is_wrong_leaves_no_block_and_no_name() -> None:
    world = World(blocks=40, size=4, limits=Limits(16, 4))
    world.add(request("a", tuple(range(6)), 20))
    world.step()
    one, blocks = world.live["a"][0], world.scheduler.blocks
    one.drafts = [5, 6, 7, 8, 9]
    step = plan(world.scheduler, 0.0)
    assert step.tokens == 6 and step.chunks[0].tokens == [one.tokens[-1], 5, 6, 7, 8, 9] and len(one.blocks) == 3
    world.scheduler.commit(step)
    assert len(blocks.found) == 1  # the first four of the prompt: nothing is published that is not certain
    one.tokens += [5, 6]
    world.scheduler.accept(one, 2)
    assert one.cached == 9 and len(one.blocks) == 3 and len(blocks.found) == 2
    one.tokens.append(3)
    one.drafts = [5, 5, 5]
    world.scheduler.commit(plan(world.scheduler, 0.0))
    world.scheduler.accept(one, 0)
    assert one.cached == 10 and len(one.blocks) == 3 and len(blocks.found) == 2 and blocks.room == 37


def test_drafts_have_the_blocks_that_no_next_token_wants() -> None:
    scheduler = Scheduler(Blocks(8, 4), Limits(64, 4))
    prompts = {"a": tuple(range(8)), "b": tuple(range(20, 28))}
    pair = [Sequence(request(id, prompt, 30), 0, list(prompt)) for id, prompt in prompts.items()]
    for one in pair:
        scheduler.add(one)
    scheduler.commit(plan(scheduler, 0.0))
    for one in pair:
        one.tokens.append(3)
        one.drafts = [1] * 12
    step = plan(scheduler, 0.0)  # four blocks are free, two of them for next tokens
    assert not step.preempted and [chunk.end - chunk.start for chunk in step.chunks] == [12, 4]
    assert scheduler.blocks.room == 0


@pytest.mark.parametrize("tenants", [1, 500])
def test_a_step_does_as_much_however_many_wait(tenants: int) -> None:
    assert calls(10_000, tenants) < 1.5 * calls(100, tenants)


def calls(waiting: int, tenants: int) -> int:
    """Functions called, in C too, by forty steps, aborts and arrivals beside so many that wait."""
    scheduler, count = Scheduler(Blocks(400, 4), Limits(16, 8)), 0
    drawn = Random(0)
    waits = [arrive(scheduler, at, tenants) for at in range(waiting)]

    def seen(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(seen)
    for at in range(40):
        step = plan(scheduler, 0.0)
        scheduler.commit(step)
        for chunk in step.chunks:
            if chunk.last:
                chunk.sequence.tokens.append(1)
        gone = waits.pop(drawn.randrange(len(waits)))
        scheduler.remove([gone])
        waits.append(arrive(scheduler, waiting + at, tenants))
    sys.setprofile(None)
    return count


def arrive(scheduler: Scheduler, at: int, tenants: int) -> Sequence:
    one = request(str(at), (at, 1, 2, 3, 4), 9, tenant=str(at % tenants), deadline=9.0 + at)
    sequence = Sequence(one, 0, list(one.prompt))
    scheduler.add(sequence)
    return sequence


def first_tokens(flood: int, prompt: tuple[int, int], again: bool) -> list[float]:
    """Seconds to the first token of each of a tenant's requests, by a clock on which a step takes 29 ms, a token of a
    prompt 0.8 and an answer's 1.6 (measured: SmolLM2-135M on two cores), alone or beside one that has so many. It asks
    anew by chance, or `again`: as soon as it is answered, so that the other's next step has just begun."""
    drawn, scheduler = Random(1), Scheduler(Blocks(8192, 16), Limits(256, 64))
    now, next_, made, took = 0.0, 3.0, 0, []
    while len(took) < 100:
        while flood > len(scheduler.fresh) + len(scheduler.running) + len(scheduler.back):
            made += 1
            add(scheduler, "a", now, [made, *[1] * drawn.randint(64, 900)], drawn.randint(32, 200))
        if now >= next_:
            made += 1
            add(scheduler, "b", next_, [made, *[1] * drawn.randint(*prompt)], 8 if again else 32)
            next_ += 1e9 if again else drawn.expovariate(0.25)
        step = plan(scheduler, now)
        now += sum(cost(chunk) for chunk in step.chunks) + 0.029 if step.chunks else next_ - now
        scheduler.commit(step)
        for chunk in step.chunks:
            one = chunk.sequence
            if chunk.last:
                one.tokens.append(1)
                if one.made == 1 and one.request.tenant == "b":
                    took.append(now - one.request.arrived)
                if one.made >= one.request.sampling.max_tokens:
                    scheduler.remove([one])
                    next_ = now + 0.001 if again and one.request.tenant == "b" else next_
    return sorted(took)


def cost(chunk: Chunk) -> float:
    """Seconds of a step for a chunk."""
    return 0.0016 if chunk.end - chunk.start == 1 else 0.0008 * (chunk.end - chunk.start)


def add(scheduler: Scheduler, tenant: str, now: float, prompt: list[int], max_tokens: int) -> None:
    one = request(str(now) + tenant + str(prompt[0]), tuple(prompt), max_tokens, tenant=tenant, at=now)
    scheduler.add(Sequence(one, 0, prompt))


def test_a_prompt_of_one_who_was_served_less_is_a_step_of_its_own_beside_many_answers() -> None:
    world = World(blocks=200, limits=Limits(tokens=8, sequences=8))
    for id in "abcdef":
        world.add(request(id, (1,), max_tokens=40, tenant="anna"))
    for _ in range(3):
        world.step()
    world.add(request("ben", tuple(range(12)), max_tokens=4, tenant="ben"))
    assert parts(world) == [("ben", 8)]
    assert parts(world) == sorted([*((id, 1) for id in "ab"), ("ben", 2)])  # their answers wait no second time
    assert parts(world) == [("ben", 2)]


def test_answers_of_a_flood_go_on_however_many_prompts_come() -> None:
    world = World(blocks=400, limits=Limits(tokens=32, sequences=4))
    for at in range(30):
        world.add(request(f"a{at}", (at,), max_tokens=99, tenant="anna"))
    world.step()
    for at in range(20):
        world.add(request(f"b{at}", (at, 1), max_tokens=1, tenant=f"ben{at}"))
    with_answers = [any(id[0] == "a" for id, _ in parts(world)) for _ in range(12)]
    assert not all(with_answers) and all(a or b for a, b in pairwise(with_answers))


def test_while_another_is_about_a_step_has_half_of_its_tokens() -> None:
    world = World(blocks=400, limits=Limits(tokens=16, sequences=4))
    for at in range(30):
        world.add(request(f"a{at}", (at,) * 40, max_tokens=4, tenant="anna"))
    assert world.step().tokens == 16
    world.add(request("b", (1,), max_tokens=1, tenant="ben"))
    while "b" in world.live:
        assert world.step().tokens <= 16
    for world.now in (1.0, ABOUT):
        assert world.step().tokens <= 8
    world.now = ABOUT + 1.0
    assert max(world.step().tokens for _ in range(20)) == 16


def test_who_comes_again_and_again_gets_no_more_than_its_share() -> None:
    world = World(blocks=400, limits=Limits(16, 4))
    given = {"a": 0, "b": 0}
    for at in range(600):
        tenants = [one[0].request.tenant for one in world.live.values()]
        if tenants.count("a") < 20:
            world.add(request(f"a{at}", tuple(Random(at).choices(range(9), k=12)), 6, tenant="a"))
        if "b" not in tenants:
            for more in range(4):
                world.add(request(f"b{at}-{more}", tuple(Random(at + more).choices(range(9), k=30)), 2, tenant="b"))
        for chunk in world.step().chunks:
            given[chunk.sequence.request.tenant] += chunk.end - chunk.start
    assert 0.5 < given["b"] / given["a"] < 1.4


@pytest.mark.parametrize(("prompt", "again"), [((100, 300), False), ((255, 255), True), ((400, 600), True)])
def test_a_flood_of_another_tenant_delays_a_first_token_by_less_than_its_own_time(
    prompt: tuple[int, int], again: bool
) -> None:
    alone = first_tokens(0, prompt, again)
    for lanes in (20, 128):
        flooded = first_tokens(lanes, prompt, again)
        assert flooded[98] <= 2 * alone[98]
        assert flooded[49] <= 2 * alone[49]
