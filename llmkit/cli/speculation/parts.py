"""The parts of the certificate, each as pieces of work that end in checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial

from llmkit.cli.acceptance.verdict import Check, at_least, at_most, holds, skipped
from llmkit.cli.speculation import accepted, closed, joint
from llmkit.cli.speculation.drafters import DRAFTERS, Make
from llmkit.cli.speculation.equality import Compared, compared
from llmkit.cli.speculation.tiny import family, lively
from llmkit.cli.speculation.trial import Trial
from llmkit.cli.speculation.ways import WAYS, asked
from llmkit.core.errors import ModelError
from llmkit.inference.sampling import Sampling

RISK = 1e-3
"""How likely it is that any test of chance fails where all is right: each has its share."""
COUNT = 8
"""Requests of a schedule."""
FAMILIES = ("Llama", "Gemma-2", "Mixtral", "Qwen3")
DRAWN = {
    "temperature": Sampling(temperature=3.0),
    "top_k, top_p": Sampling(temperature=4.0, top_k=4, top_p=0.95),
}
TOLD = ("known", "branching", "recycled", "several", "head")
"""Drafters whose law hangs on more than the text."""
Job = Callable[[], Iterable[Check]]


@dataclass(frozen=True)
class Asked:
    """What was said on the command line."""

    seed: int = 0
    draws: int = 100_000
    """Answers of joint laws, over all."""
    sequences: int = 600
    """Answers that are compared, at least."""
    model: str = ""


def law(said: Asked) -> list[Job]:
    """The exact law on a toy model."""
    return [partial(closed.law, said.seed)]


def acceptance(said: Asked) -> list[Job]:
    """How many drafts are kept, on the toy and by an engine."""
    modelled = {name: make for name, make in DRAFTERS.items() if name not in TOLD}
    each = max(1, said.draws // (2 * len(modelled)))

    def job(at: int, name: str, make: Make) -> Iterable[Check]:
        found = accepted.kept(small(), make, DRAWN["temperature"], each, seeds(said.seed, at))
        return found.checks(name, RISK / len(modelled))

    return [partial(closed.kept, said.seed), *(partial(job, at, *one) for at, one in enumerate(modelled.items()))]


def joints(said: Asked) -> list[Job]:
    """The law of several tokens together, for each drafter, and of all draws together."""
    cells = len(DRAFTERS) * len(DRAWN)
    each, together = max(1, said.draws // cells), {name: Counter[tuple[int, ...]]() for name in DRAWN}
    risk = RISK / (cells + len(DRAWN))

    def job(at: int, name: str, make: Make, way: str) -> Iterable[Check]:
        made = joint.drawn(small(), make, DRAWN[way], each, seeds(said.seed, 100 + at))
        counted = joint.counts(made)
        together[way] += counted
        yield told(f"{name}, {way}: chance", counted, joint.law(small(), DRAWN[way]), risk)

    def whole() -> Iterable[Check]:
        for way, counted in together.items():
            yield told(f"all, {way}: chance", counted, joint.law(small(), DRAWN[way]), risk)

    pairs = [(name, make, way) for way in DRAWN for name, make in DRAFTERS.items()]
    return [*(partial(job, at, *one) for at, one in enumerate(pairs)), whole]


def told(name: str, counted: Counter[tuple[int, ...]], law: Mapping[tuple[int, ...], float], risk: float) -> Check:
    """A G-test of counts of texts."""
    said = f"{sum(counted.values())} texts of {joint.LENGTH} tokens of {joint.WORDS}"
    return at_least(name, joint.chance(law, counted), risk, said)


def equality(said: Asked) -> list[Job]:
    """Answers with drafts and without: tiny models of several families, all ways of choosing, all drafters."""
    found = {name: Compared() for name in DRAFTERS}
    ways, runs = list(WAYS), -(-said.sequences // (COUNT * len(DRAFTERS)))

    def job(at: int) -> Iterable[Check]:
        trial = of_family(FAMILIES[at % len(FAMILIES)])
        requests = asked(seeds(said.seed, at), COUNT, ways[at % len(ways)])
        _join(found, compared(trial, requests, DRAFTERS, range(len(DRAFTERS) * at, len(DRAFTERS) * (at + 1))))
        return []

    return [*(partial(job, at) for at in range(runs)), lambda: counted(found)]


def real(said: Asked) -> list[Job]:
    """The same on a model of the user's; its cost is that of some hundred short answers."""
    if not said.model:
        return [lambda: [skipped("answers", "no model is named")]]
    makers = {name: make for name, make in DRAFTERS.items() if name not in ("draft", "several")}  # no second model
    found = {name: Compared() for name in makers}

    def job(at: int, way: str) -> Iterable[Check]:
        try:
            trial, pool = of_name(said.model)
        except ModelError as cause:
            return [skipped("answers", str(cause))] if at == 0 else []
        requests = asked(seeds(said.seed, at), COUNT, way, pool)
        _join(found, compared(trial, requests, makers, range(len(makers) * at, len(makers) * (at + 1))))
        return []

    ways = ("greedy", "drawn", "told", "penalties", "several")
    return [*(partial(job, at, way) for at, way in enumerate(ways)), lambda: counted(found)]


def counted(found: Mapping[str, Compared]) -> Iterable[Check]:
    """Mismatches by drafter, and whether schedules were of all kinds."""
    if not any(one.answers for one in found.values()):
        return
    for name, one in found.items():
        said = f"of {one.answers} answers; {one.accepted} of {one.drafted} drafts kept"
        yield at_most(f"{name}: different answers", one.different, 0, said + (f"; {one.first}" if one.first else ""))
    total = Compared()
    for one in found.values():
        total.join(one)
    yield at_most("blocks that nobody gave back", total.leaked, 0)
    all_ = min(total.preempted, total.hits, total.drafted - total.accepted, total.accepted)
    said = f"{total.answers} answers, {total.preempted} preempted, {total.hits} tokens found in the cache"
    yield holds("schedules of all kinds", all_ > 0, said)


def seeds(seed: int, at: int) -> int:
    """The first of those of one piece of work, far from the others'."""
    return (seed * 1_000 + at) * 1_000_000


@cache
def small() -> Trial:
    """A model of a few words, whose texts end by length alone."""
    return Trial(lively(words=joint.WORDS), ends=())


@cache
def of_family(name: str) -> Trial:
    """A tiny model of a family; of Llama one whose text depends on every token of it."""
    return Trial(lively() if name == "Llama" else family(name))


@cache
def of_name(name: str) -> tuple[Trial, list[int]]:
    """A model of the user's, and tokens that prompts are made of.

    Raises:
        ModelError: there is none, or its rows depend on those beside them.
    """
    from llmkit.build.opening import load
    from llmkit.inference.generate import ends
    from llmkit.models.load import How
    from llmkit.models.node import ModelRef
    from llmkit.models.resolve import resolve

    ref = ModelRef(name=name)
    loaded = load(resolve(ref), ref, How())
    pool = loaded.tokenizer.encode("The cat sat on the mat, and the dog, which had seen it, went home: one two three.")
    return Trial(loaded.model, loaded.tokenizer, ends=ends(loaded.model, loaded.tokenizer)), pool


def _join(found: Mapping[str, Compared], more: Mapping[str, Compared]) -> None:
    for name, one in more.items():
        found[name].join(one)


PARTS: Mapping[str, Callable[[Asked], list[Job]]] = {
    "law": law,
    "acceptance": acceptance,
    "joint": joints,
    "equality": equality,
    "model": real,
}
