"""What `kind: best_of` leaves of its answers: rows to train on, a table of the best ones, and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from llmkit.core.files import as_json, write_atomic
from llmkit.core.metrics import Lines
from llmkit.core.records import Prediction, write
from llmkit.core.run import Run
from llmkit.core.types import Report
from llmkit.data.asked import Asked
from llmkit.rl.kept_node import Rated
from llmkit.stages.best_of import BestOf
from llmkit.stats.bootstrap import ratio


def kept(node: BestOf, run: Run, asked: Asked, lines: Lines) -> list[Report]:
    """Writes the rows that are kept and a table of the best answers; gives the figures."""
    told = lines.read()[1:]
    answers = [line["answers"] for line in told]
    rows: list[str] = []
    taken: list[int] = []
    for at, own in enumerate(answers):
        question = asked.rows[at].question
        rated = [Rated(_said(question, one["text"]), one["score"], one["scores"]) for one in own]
        found = node.keep.rows(rated)
        taken.append(len(found))
        before = _before(asked, at)
        rows += [as_json({**before, **one}) + "\n" for one in found]
    write_atomic(run.folder / "rows.jsonl", "".join(rows).encode())
    run.console.notice(f"{len(rows)} rows of {len(answers)} prompts are in {run.folder / 'rows.jsonl'}")
    write(run.folder / "predictions.jsonl", [_prediction(node, run, asked, at, own) for at, own in enumerate(answers)])
    return _figures(node, asked, answers, taken) + _beside(node, asked, told)


def _said(question: Any, text: str) -> Any:
    """An answer in the form of its prompt."""
    return text if isinstance(question, str) else [{"role": "assistant", "content": text}]


def _before(asked: Asked, at: int) -> dict[str, Any]:
    """The prompt, the row's other columns, and its tools."""
    row = asked.rows[at]
    tools = {"tools": list(row.tools)} if row.tools else {}
    prompt = row.question if isinstance(row.question, str) else [dict(message) for message in row.question]
    return {"prompt": prompt, **asked.columns[at], **tools}


def _prediction(node: BestOf, run: Run, asked: Asked, at: int, answers: Sequence[Mapping[str, Any]]) -> Prediction:
    """The best answer to a prompt, as a row of a table."""
    best = max(answers, key=lambda one: one["score"])
    row, columns = asked.rows[at], asked.columns[at]
    asks = row.question if isinstance(row.question, str) else str(row.question[-1].get("content") or "")
    return Prediction(
        example_id=f"{node.kind}/{row.id}",
        cluster_id=row.cluster,
        slices={"task": node.kind},
        label=str(columns.get("answer", "")),
        scores={"reward": best["score"], **best["scores"]},
        prediction=best["text"],
        text=asks,
        run_id=run.recipe_digest[:16],
    )


def _figures(node: BestOf, asked: Asked, answers: Sequence[Any], taken: Sequence[int]) -> list[Report]:
    """Means with intervals over prompts."""
    clusters = [asked.rows[at].cluster for at in range(len(answers))]

    def mean(name: str, of: Callable[[Sequence[Any]], float], under: Callable[[Sequence[Any]], float]) -> Report:
        return ratio(f"best_of.{name}", list(map(of, answers)), list(map(under, answers)), clusters, seed=node.seed)

    names = list(answers[0][0]["scores"])
    made = [mean("reward", lambda own: sum(one["score"] for one in own), len)]
    made.append(mean("best", lambda own: max(one["score"] for one in own), lambda own: 1.0))
    made += [mean(f"reward.{name}", partial(_summed, name), len) for name in names]
    made.append(mean("tokens", lambda own: sum(one["tokens"] for one in own), len))
    made.append(mean("ended", lambda own: sum(one["finish_reason"] == "stop" for one in own), len))
    made.append(mean("different", lambda own: len({one["text"] for one in own}), len))
    made.append(ratio("best_of.kept", [float(n > 0) for n in taken], None, clusters, seed=node.seed))
    return made


def _beside(node: BestOf, asked: Asked, told: Sequence[Mapping[str, Any]]) -> list[Report]:
    """What rewards tell of themselves, over the prompts that were scored together."""
    clusters = [row.cluster for row in asked.rows]
    names = dict.fromkeys(name for line in told for name in line["figures"])
    of = {name: [line["figures"].get(name, 0.0) for line in told] for name in names}
    return [ratio(f"best_of.reward.{name}", values, None, clusters, seed=node.seed) for name, values in of.items()]


def _summed(name: str, answers: Sequence[Any]) -> float:
    return float(sum(one["scores"][name] for one in answers))
