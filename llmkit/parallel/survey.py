"""What a long run rests on, measured on all ranks: collectives, disk, clocks, versions, how fast each one computes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from llmkit.core.files import refused
from llmkit.core.peers import Peers
from llmkit.parallel.group import Group

KIB, MIB = 1 << 10, 1 << 20
SIZES = {"cpu": (4 * KIB, 64 * KIB, MIB, 16 * MIB), "cuda": (64 * KIB, MIB, 16 * MIB, 256 * MIB)}
"""Bytes of an all-reduce: from what a scalar costs to what gradients are."""
DISK = 64 * MIB
SIDES = {"cpu": 768, "cuda": 8192}
"""Of the square matrices whose product is timed."""
SLOW = 0.75
"""A rank below this part of the median is told to be slow."""
APART = 1.0
"""Seconds that clocks may differ: logs and leases are compared by them."""


def survey(
    peers: Peers, device: str, folder: Path, facts: Mapping[str, str], now: Callable[[], float] = time.time
) -> dict[str, Any]:
    """The same answer on every rank: `ranks`, a dictionary each; `collectives`, one for each size; `findings`.

    `facts` is what ranks must have in common, such as versions. Nothing stays in `folder`.

    Raises:
        ResourceError: the folder cannot be written.
    """
    peers.barrier("survey")
    mine: dict[str, Any] = {"name": peers.ranks.name, "facts": dict(facts)}
    mine |= {"compute_gflops": _compute(device), "disk_mib_per_second": _disk(folder, peers.ranks.rank)}
    peers.barrier("survey")
    ranks = peers.gather(mine)
    for one, (ahead, trip) in zip(ranks, _clocks(peers, now), strict=True):
        one |= {"clock_seconds": ahead, "round_trip_seconds": trip}
    collectives = [_all_reduce(peers, device, size) for size in SIZES[device]] if peers.ranks.world > 1 else []
    return {"world": peers.ranks.world, "ranks": ranks, "collectives": collectives, "findings": findings(ranks)}


def findings(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What to look at, in words; `disagree` where ranks cannot be of one run."""
    found = []
    for one in ranks[1:]:
        for key in sorted(one["facts"].keys() | ranks[0]["facts"].keys()):
            theirs, ours = (each["facts"].get(key, "none") for each in (one, ranks[0]))
            if theirs != ours:
                what = f"{one['name']} has {key} {theirs}, and {ranks[0]['name']} has {ours}"
                found.append({"what": what, "disagree": True})
    for one in ranks:
        if abs(one["clock_seconds"]) > APART:
            what = f"the clock of {one['name']} is {one['clock_seconds']:+.2f} s from that of {ranks[0]['name']}"
            found.append({"what": what, "disagree": True})
    for key, what in (("compute_gflops", "computes"), ("disk_mib_per_second", "writes")):
        middle = median(one[key] for one in ranks)
        slow = [one for one in ranks if one[key] < SLOW * middle]
        found += [
            {"what": f"{one['name']} {what} at {one[key] / middle:.0%} of the median rank", "disagree": False}
            for one in slow
        ]
    return found


def _timed(work: Callable[[], object], device: str, times: int) -> list[float]:
    """The seconds that `work` takes, each time, after one try that is not counted."""
    taken = []
    for _ in range(times + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return taken[1:]


def _compute(device: str) -> float:
    """GFLOP/s of a square matrix product: fp32 on CPUs, bf16 on GPUs."""
    side, kind = SIDES[device], torch.float32 if device == "cpu" else torch.bfloat16
    a = torch.ones(side, side, device=device, dtype=kind)
    return float(2 * side**3 / min(_timed(lambda: a @ a, device, 5)) / 1e9)


def _disk(folder: Path, rank: int) -> float:
    """MiB/s of a file that is written and synced."""
    path, block = folder / f".survey-{rank}-{os.getpid()}", bytes(4 * MIB)
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(DISK // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return DISK / MIB / (time.perf_counter() - began)
    except OSError as cause:
        raise refused(cause, "writing", path, DISK) from cause
    finally:
        path.unlink(missing_ok=True)


def _all_reduce(peers: Peers, device: str, size: int) -> dict[str, float]:
    """Seconds of the slowest rank, and the bus bandwidth, 2 (n - 1) / n x size / seconds: it compares across n."""
    tensor = torch.ones(size // 4, device=device)
    peers.barrier("survey")
    seconds = max(peers.gather(median(_timed(lambda: dist.all_reduce(tensor), device, 5))))
    world = peers.ranks.world
    return {"bytes": size, "seconds": seconds, "gb_per_second": 2 * (world - 1) / world * size / seconds / 1e9}


def _clocks(peers: Peers, now: Callable[[], float], times: int = 8) -> list[list[float]]:
    """[seconds ahead of the main rank, round trip] of each rank: of the quickest of some exchanges, as NTP does."""
    told = [[0.0, 0.0]]
    if peers.ranks.world == 1:
        return told
    group = peers.host if isinstance(peers, Group) else None
    word = torch.zeros(1, dtype=torch.float64)
    for rank in range(1, peers.ranks.world):
        tries = []
        for _ in range(times):
            if peers.ranks.main:
                began = now()
                dist.send(word, rank, group)
                dist.recv(word, rank, group)
                ended = now()
                tries.append([ended - began, float(word) - (began + ended) / 2])
            elif peers.ranks.rank == rank:
                dist.recv(word, 0, group)
                dist.send(torch.tensor([now()], dtype=torch.float64), 0, group)
        told += [[ahead, trip] for trip, ahead in [min(tries)]] if tries else []
    shared: list[list[float]] = peers.share(told)
    return shared
