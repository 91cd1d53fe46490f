"""Constitutional AI, step by step: each leaves a file of lines in the run's folder, and goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from llmkit.core.artifact import Artifact, publish
from llmkit.core.files import as_json, write_atomic
from llmkit.core.metrics import Lines
from llmkit.core.run import Run
from llmkit.core.walk import each
from llmkit.data.asked import asking
from llmkit.data.node import Data
from llmkit.data.order import spread
from llmkit.data.rows import Unusable, introduced
from llmkit.data.source_nodes import Source
from llmkit.data.usable import Tally, readable
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.rl import constitution as words
from llmkit.rl.constitution_node import Constitution, Principle
from llmkit.rl.judge import read
from llmkit.rl.mouths import Mouths
from llmkit.rl.role_node import Role
from llmkit.rl.sample import Messages
from llmkit.stages.constitution_rows import Found, Line, preferred, supervised
from llmkit.stages.constitution_told import tell
from llmkit.stages.constitutional import Constitutional
from llmkit.stages.known import known
from llmkit.stages.report import write_report

AT_ONCE = 64
"""Rows of which a step asks together."""


@dataclass(frozen=True)
class Work:
    """One run."""

    node: Constitutional
    run: Run
    constitution: Constitution
    mouths: Mouths

    @property
    def critic(self) -> Role:
        """Who looks at answers."""
        return self.node.critic or self.node.own

    @property
    def reviser(self) -> Role:
        """Who writes them anew."""
        return self.node.reviser or self.critic

    @property
    def judge(self) -> Role:
        """Who compares them."""
        return self.node.judge or self.critic

    def principles(self, count: int, row: int, part: int) -> list[Principle]:
        """Those that a row draws, for its rounds or for its comparison."""
        return words.drawn(self.constitution, count, self.node.seed * 2 + part, row)

    def digests(self) -> dict[str, str]:
        """What rows are made by."""
        roles = {"critic": self.critic, "reviser": self.reviser, "judge": self.judge}
        made = {name: who(role) for name, role in roles.items()}
        own = replace(self.node.own, sampling=self.node.sampling)
        return {"prompts": words.digest(self.constitution), "model": who(own), **made}


def who(asked: Role) -> str:
    """A digest of a model and of how it is asked; the key of an endpoint is no part of it."""
    facts: Line = {name: value for name, value in asdict(asked).items() if name != "model"}
    facts["generator"] = {name: value for name, value in facts["generator"].items() if name != "key"}
    facts["model"] = resolve(asked.model).sha256 if asked.model is not None else ""
    return _digest(facts)


def made(node: Constitutional, run: Run) -> Artifact:
    """All steps, what they come to, and what is to be told of it."""
    torch.set_num_threads(run.threads)
    known(dict(each(node, (ModelRef,))), {})  # each named by its key
    node.ready()
    constitution = words.read(node.constitution)
    asked = questions(node.prompts, "prompts", node.rows)
    harmless = questions(node.harmless, "harmless", node.rows) if node.harmless else []
    with run.stop.at_once("while rows are made"), Mouths(run.grants, run.device, node.precision) as mouths:
        work = Work(node, run, constitution, mouths)
        digests, found = work.digests(), Found(asked, harmless)
        found.sampled = _sampled(work, "sampled", asked, 2 if "preferences" in node.makes else 1)
        if "supervised" in node.makes:
            found.rounds = _rounds(work, "", asked, found.sampled)
        if "preferences" in node.makes:
            found.judged = _judged(work, asked, found.sampled)
        if harmless:
            found.calm = _sampled(work, "harmless.sampled", harmless, 1)
            found.calmed = _rounds(work, "harmless.", harmless, found.calm)
    counts = Counter[str]()
    if "supervised" in node.makes:
        _write(run, "supervised", supervised(found, digests, counts))
    if "preferences" in node.makes:
        _write(run, "preferences", preferred(node, found, digests, counts))
    facts = tell(run, found, counts, node.seed)
    write_report(run.folder)
    own = {"kind": node.kind, "constitution": constitution.name, "digests": digests, "counts": dict(counts)}
    return publish(run.folder, own | facts | {"recipe_digest": run.recipe_digest, "recipe": run.values})


def questions(sources: Sequence[Source], key: str, most: int | None = None) -> list[str | Messages]:
    """What at most `most` rows, from all over them, ask: their `prompt`, or all before their last answer.

    Raises:
        DataError: a row cannot be read, too many are unusable, or none asks anything.
    """
    tally, found = Tally(Data(train=tuple(sources)), Counter[str]()), list[str | Messages]()
    for raw, values in readable(sources, tally):
        try:
            row = introduced(asking(values, len(found)), tally.data.system)
            if not row.question:
                raise Unusable("nothing is asked")
        except Unusable as reason:
            tally.unusable(raw, str(reason))
            continue
        found.append(row.question if isinstance(row.question, str) else tuple(row.question))
    tally.check(len(found), 1, key)
    return [found[place] for place in spread(len(found), most)]


def _step(work: Work, name: str, count: int, settings: Any, make: Callable[[range], list[Line]]) -> list[Line]:
    """The lines of a step: those that are there, and the others, some rows at a time."""
    run, lines = work.run, Lines(work.run.folder / f"{name}.jsonl")
    found = lines.after({"of": _digest(settings)})
    if len(found) == count:
        return found
    found = found[: len(found) // AT_ONCE * AT_ONCE]  # what is asked together is asked together again
    lines.cut(sum(len(line) + 1 for line in lines.path.read_bytes().split(b"\n")[: len(found) + 1]))
    run.console.start(name, count, len(found))
    for begin in range(len(found), count, AT_ONCE):
        for line in make(range(begin, min(begin + AT_ONCE, count))):
            lines.add(line)
            found.append(line)
        run.console.step(name, len(found), count)
        run.stop.check("while rows are made")
    run.console.end()
    return found


def _sampled(work: Work, name: str, asked: Sequence[str | Messages], count: int) -> list[Line]:
    """`count` answers to each prompt."""
    role = replace(work.node.own, sampling=work.node.sampling)

    def make(rows: range) -> list[Line]:
        said = work.mouths.say(role, [asked[row] for row in rows], _seed(work, name, rows.start), count)
        return [{"row": row, "answers": answers} for row, answers in zip(rows, said, strict=True)]

    return _step(work, name, len(asked), [who(role), asked, count, work.node.seed], make)


def _rounds(
    work: Work, prefix: str, asked: Sequence[str | Messages], sampled: Sequence[Line]
) -> list[tuple[list[Line], list[Line]]]:
    """Critique and revision, round by round."""
    node, found = work.node, list[tuple[list[Line], list[Line]]]()
    answers = [line["answers"][0] for line in sampled]
    drawn = [work.principles(node.rounds, row, 0) for row in range(len(asked))]
    for turn in range(node.rounds):
        names = f"{prefix}critique-{turn + 1}", f"{prefix}revision-{turn + 1}"
        principles = [each[turn] for each in drawn]
        said = _critique(work, names[0], asked, answers, principles)
        new = _revision(work, names[1], asked, answers, said, principles)
        found.append((said, new))
        answers = [line["answer"] or before for line, before in zip(new, answers, strict=True)]
    return found


def _critique(
    work: Work,
    name: str,
    asked: Sequence[str | Messages],
    answers: Sequence[str],
    principles: Sequence[Principle],
) -> list[Line]:
    def make(rows: range) -> list[Line]:
        put = [words.critique(principles[row], asked[row], answers[row]) for row in rows]
        said = work.mouths.say(work.critic, put, _seed(work, name, rows.start))
        return [
            {"row": row, "principle": principles[row].name, "critique": one, "objects": words.objects(one)}
            for row, (one,) in zip(rows, said, strict=True)
        ]

    settings = [who(work.critic), asked, answers, words.digest(work.constitution), work.node.seed]
    return _step(work, name, len(asked), settings, make)


def _revision(
    work: Work,
    name: str,
    asked: Sequence[str | Messages],
    answers: Sequence[str],
    said: Sequence[Line],
    principles: Sequence[Principle],
) -> list[Line]:
    """A new answer where the critic wants one; else none."""

    def make(rows: range) -> list[Line]:
        some = [row for row in rows if said[row]["objects"]]
        put = [words.revision(principles[row], asked[row], answers[row], said[row]["critique"]) for row in some]
        told = work.mouths.say(work.reviser, put, _seed(work, name, rows.start))
        new = {row: one.strip() for row, (one,) in zip(some, told, strict=True)}
        return [{"row": row, "answer": new.get(row)} for row in rows]

    settings = [who(work.reviser), asked, answers, [line["critique"] for line in said], work.node.seed]
    return _step(work, name, len(asked), settings, make)


def _judged(work: Work, asked: Sequence[str | Messages], sampled: Sequence[Line]) -> list[Line]:
    """What the judge says of both answers to each prompt, in both orders, as often as it votes."""
    node, pairs = work.node, [line["answers"] for line in sampled]
    principles = [work.principles(1, row, 1)[0] for row in range(len(asked))]

    def make(rows: range) -> list[Line]:
        some = [row for row in rows if pairs[row][0] != pairs[row][1]]  # of equal ones there is nothing to say
        put = [
            words.preference(principles[row], asked[row], *order)
            for row in some
            for _ in range(node.votes)
            for order in (pairs[row], pairs[row][::-1])
        ]
        told = iter([read(one) for (one,) in work.mouths.say(work.judge, put, _seed(work, "judged", rows.start))])
        votes = {row: [(next(told), next(told)) for _ in range(node.votes)] for row in some}
        return [
            {
                "row": row,
                "principle": principles[row].name,
                "votes": [[one, None if other is None else 1 - other] for one, other in votes.get(row, [])],
            }
            for row in rows
        ]

    settings = [who(work.judge), asked, pairs, words.digest(work.constitution), node.votes, node.seed]
    return _step(work, "judged", len(asked), settings, make)


def _write(run: Run, name: str, rows: Sequence[Line]) -> None:
    text = "".join(as_json(row) + "\n" for row in rows)
    write_atomic(run.folder / f"{name}.jsonl", text.encode())
    run.console.notice(f"{name}.jsonl: {len(rows)} rows")


def _seed(work: Work, name: str, first: int) -> int:
    """Of the first of some asks of a step."""
    return int(_digest([work.node.seed, name, first])[:12], 16)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
