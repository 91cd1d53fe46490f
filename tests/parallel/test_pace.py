"""Who is slow, and who only waits."""

from llmkit.parallel.pace import FACTOR, TIMES, Judge, Pace


def told(*forward, seconds=1.0, data=0.01, product=0.003):
    more = {"seconds": seconds, "data": data, "product": product}
    return [{"name": f"rank {rank} (host)", "forward": took} | more for rank, took in enumerate(forward)]


def test_own_time_is_that_of_data_and_forward_passes():
    now = [0.0]
    pace = Pace("cpu", lambda: now[0])

    def spend(phase, seconds):
        pace.phase(phase)
        now[0] += seconds

    for _ in range(2):
        for phase, seconds in (("data", 1.0), ("forward", 2.0), ("backward", 40.0), ("forward", 3.0), ("reduce", 50.0)):
            spend(phase, seconds)
        spend("log", 60.0)
    found = pace.taken()
    assert (found["data"], found["forward"]) == (1.0, 5.0) and found["product"] == 0.0
    assert pace.taken()["forward"] == 0.0
    assert Pace("cpu").taken()["product"] > 0


def test_a_slow_rank_is_named_after_several_reports():
    judge = Judge()
    slow = told(0.4, 0.4, 0.4 * FACTOR * 1.2, 0.4)
    assert [judge.slow(slow) for _ in range(TIMES - 1)] == [[]] * (TIMES - 1)
    (found,) = judge.slow(slow)
    assert found["rank"] == 2 and found["said"] == "rank 2 (host) computes in 1.6 x the time of the median rank"
    assert judge.slow(told(0.4, 0.4, 0.4, 0.4)) == [] == judge.slow(slow)  # it begins anew


def test_who_is_not_slow():
    judge, fast = Judge(), told(0.4, 0.1, 0.4, 0.4)  # one that is faster makes nobody slow
    brief = told(0.002, 0.002, 0.009, 0.002)  # several times as long, and nothing of the step
    a_little = told(0.4, 0.4, 0.4 * FACTOR * 0.95, 0.4)
    for each in (fast, brief, a_little):
        assert [judge.slow(each) for _ in range(2 * TIMES)] == [[]] * 2 * TIMES
    assert [Judge().slow(told(0.4)) for _ in range(TIMES)] == [[]] * TIMES


def test_of_two_the_faster_one_is_the_measure_and_products_tell_who_waits_for_nobody():
    judge, two = Judge(), told(0.4, 0.8)
    assert [len(judge.slow(two)) for _ in range(TIMES)] == [0] * (TIMES - 1) + [1]
    alike = told(0.4, 0.4, 0.4)
    alike[1]["product"] *= 1.5
    judge = Judge()
    assert [judge.slow(alike) for _ in range(TIMES)][-1][0]["said"].startswith(
        "rank 1 (host) multiplies matrices in 1.5 x"
    )
