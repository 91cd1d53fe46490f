"""The thresholds of `llmkit prove cluster`, each with its reason; they were written before any cluster was seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Bar:
    """A limit, and why it is that one."""

    limit: float
    reason: str


def _efficiency() -> dict[str, Bar]:
    return {
        "cuda": Bar(0.80, "gradients are sent behind the backward pass; what is left over is less than a fifth"),
        "cpu": Bar(0.50, "ranks on a core each share the memory's rate, and gloo sends by the same cores"),
    }


def _bandwidth() -> dict[str, Bar]:
    return {
        "cuda": Bar(0.50, "of the data sheet's link: the planner reckons with 0.75, and at half its times do not hold"),
        "cpu": Bar(0.02, "GB/s: gloo over one machine reaches some tenths; below this it goes a way it should not"),
    }


@dataclass(frozen=True)
class Bars:
    """All of them. Differences are relative to the largest value; two are by kind of device."""

    equal: Bar = Bar(1e-5, "in fp32 the order of sums moves a loss or a gradient norm by less than this in three steps")
    equal_short: Bar = Bar(2e-2, "in 16 bits the order of sums is worth three digits, and two are left")
    learned: Bar = Bar(1e-5, "of the way that the weights went in three steps; their own rounding is a millionth of it")
    weights: Bar = Bar(1e-5, "with plain SGD in fp32 weights differ as gradients do; of other optimizers they are told")
    notice: Bar = Bar(10.0, "seconds: the watch hears of a death at once, and the main thread has 6 s to end by itself")
    stop: Bar = Bar(10.0, "seconds: a launcher kills who takes 30 s after SIGTERM, and a tiny model is saved in one")
    resumed: Bar = Bar(1e-5, "torch lays the buckets of gradients anew, so that sums of three ranks have another order")
    efficiency: Mapping[str, Bar] = field(default_factory=_efficiency)
    """Tokens a second of n ranks over n times those of the fewest, each with as many rows."""
    peak: Bar = Bar(0.10, "what `micro_batch: auto` keeps free, so that what is planned to fit does fit")
    step: Bar = Bar(0.30, "the formulas know no kernels and no stalls; blind on published runs the worst was 15 %")
    bandwidth: Mapping[str, Bar] = field(default_factory=_bandwidth)
    """Bus bandwidth of the largest all-reduce."""
    trial: Bar = Bar(1800.0, "seconds: a run of a few steps that takes longer hangs")
    grace: Bar = Bar(50.0, "seconds beyond `notice` or `stop` after which who is left is killed, and counts as failed")
