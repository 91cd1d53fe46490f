"""The pool of tensor memory, in processes of its own: contents, holes, growth, forks, refusals."""

import subprocess
import sys

import pytest
from llmkit_kernels.build import lacks

pytestmark = pytest.mark.skipif(bool(lacks("memory")), reason=lacks("memory"))

BEGIN = """
import os, random, resource, torch
from llmkit_kernels import memory
old = torch.arange(100_000.0)  # from before: it goes back to where it came from
assert memory.install() == "" == memory.install()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def addresses():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
"""


def said(code):
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_contents_last_through_any_order_of_taking_and_giving():
    out = said("""
random.seed(0)
held = {}
for turn in range(4000):
    if held and random.random() < 0.5:
        key = random.choice(list(held))
        tensor, value = held.pop(key)
        assert bool((tensor == value).all())
    else:
        size = random.choice([0, 1, 100, 8191, 8192, 8193, 70_000, 300_000, random.randrange(1_000_000)])
        tensor = torch.empty(size, dtype=torch.float32)
        assert tensor.data_ptr() % 64 == 0
        held[turn] = (tensor.fill_(turn), turn)
    if turn % 500 == 0:
        memory.trim()
assert all(bool((tensor == value).all()) for tensor, value in held.values())
del old
print(len(held) > 0)
""")
    assert out == ["True"]


def test_what_was_given_back_is_used_again_and_merged():
    out = said("""
def taken():
    made = [torch.empty(1 << 20) for _ in range(64)]
    return {x.data_ptr() for x in made}
first = taken()
print(taken() == first)
whole = torch.ones(60 << 20)  # fits where the 64 lay, only if they became one
print(min(first) <= whole.data_ptr() <= max(first))
""")
    assert out == ["True", "True"]


def test_a_trim_gives_memory_and_addresses_back_and_keeps_what_is_in_use():
    out = said("""
kept, gone, held = torch.ones(1 << 20), torch.ones(100 << 20), torch.ones(1 << 20)
del gone
full, long = resident(), addresses()
memory.trim()
print(full - resident() > 300 << 20, long - addresses() > 300 << 20, float(kept.sum() + held.sum()) == 2 << 20)
again = [torch.full((size,), 2.0) for size in (100 << 20, 10_000, 1 << 20)]
del kept, held
print(all(float(one[0] + one[-1]) == 4 for one in again))
""")
    assert out == ["True", "True", "True", "True"]


def test_what_is_reserved_is_resident_before_it_is_taken():
    out = said("""
before = resident()
memory.reserve(200 << 20)
there = resident()
taken = torch.empty(199 << 18).fill_(1)
print(there - before > 190 << 20, resident() - there < 20 << 20)
memory.reserve(1 << 60)  # more than there is: refused, and nothing is lost
print(float(taken.sum()) == 199 << 18)
""")
    assert out == ["True", "True", "True"]


def test_a_forked_child_has_a_pool_of_its_own():
    out = said("""
torch.set_num_threads(1)  # OpenMP's threads do not live on in a child
kept = torch.ones(100_000)
pid = os.fork()
if pid == 0:
    kept.zero_()
    more = [torch.ones(50_000) for _ in range(20)]
    os._exit(0 if float(more[-1].sum()) == 50_000 else 1)
print(os.waitpid(pid, 0)[1], float(kept.sum()) == 100_000)
""")
    assert out == ["0", "True"]


def test_threads_take_and_give_at_once():
    out = said("""
from concurrent.futures import ThreadPoolExecutor
def work(number):
    for turn in range(300):
        tensor = torch.full((10_000 + 37 * turn,), float(number))
        if not bool((tensor == number).all()):
            return False
    return True
with ThreadPoolExecutor(8) as pool:
    print(all(pool.map(work, range(8))))
""")
    assert out == ["True"]


def test_more_than_there_is_is_refused_as_torch_does():
    out = said("""
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    torch.empty(4 << 30)
except RuntimeError as cause:
    print("memory:" in str(cause), "can't allocate memory" in str(cause))
print(float(torch.ones(100_000).sum()) == 100_000)
""")
    assert out == ["True", "True", "True"]
