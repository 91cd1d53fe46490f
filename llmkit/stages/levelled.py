"""What `auto` comes to on all ranks together: their free memory differs, and their steps must not."""

from __future__ import annotations

from dataclasses import replace

from llmkit.core.peers import Peers
from llmkit.parallel.node import Fsdp
from llmkit.plan.choice import RECOMPUTE
from llmkit.stages.job import Job


def room_seen(peers: Peers) -> None:
    """Every rank of the run, those that only draw too, knows what is free before any reads its model: ranks of a host
    share its memory, and what one holds already would count as taken and as its share."""
    if peers.apart is not None:
        peers.apart.whole.barrier("data")


def levelled(job: Job) -> Job:
    """The job with the sizes and the strategy that fit every rank; called by all of them."""
    if job.run.ranks.world == 1:
        return job
    order, mine = list(RECOMPUTE), job.choice
    said = job.run.peers.gather([mine.rows, order.index(mine.recompute), mine.strategy == "fsdp"])
    rows, again = min(each[0] for each in said), order[max(each[1] for each in said)]
    job = replace(job, choice=replace(mine, rows=rows, recompute=again))
    parallel = job.node.parallel
    if not any(each[2] for each in said) or parallel.resolve(job.run.ranks.world).kind == "fsdp":
        return job
    job.run.console.notice("a copy does not fit on each rank: parallel.strategy is fsdp")
    return replace(job, node=replace(job.node, parallel=replace(parallel, strategy=Fsdp(), replicate="auto")))
