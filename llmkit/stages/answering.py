"""Prompts -> answers with their rewards: the engine draws (`drawing.py`), and rewards judge."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmkit.build.training import Built
from llmkit.core.run import Run
from llmkit.core.seed import mixed
from llmkit.data.asked import Asked
from llmkit.data.order import keyed
from llmkit.data.render import Renderer
from llmkit.inference.detokenise import detokeniser
from llmkit.inference.generate import ends
from llmkit.inference.request import asked_by
from llmkit.rl.advantages import without_signal
from llmkit.rl.bench import Bench
from llmkit.rl.conversation import Speech
from llmkit.rl.rollout import Answer, converse, draw, samples, seeds
from llmkit.rl.scoring import Scores, score
from llmkit.stages.drawing import Drawing
from llmkit.stages.from_rollouts import FromRollouts
from llmkit.stages.worth import Worth


class Answering:
    """What draws and judges. What is drawn follows from the number of the rollout, the prompts and the weights."""

    def __init__(
        self, run: Run, node: FromRollouts, asked: Asked, built: Built, drawing: Drawing, bench: Bench
    ) -> None:
        self.run, self.node, self.asked, self.drawing, self.bench = run, node, asked, drawing, bench
        self.noticed = set[str]()
        self.ends = tuple(ends(built.loaded.model, built.loaded.tokenizer))
        self.words = detokeniser(built.loaded.tokenizer, special=True)
        environment = node.rollout.environment
        self.environment = None if environment is None else environment.open()
        self.speech = None if environment is None else Speech.of(Renderer(built.loaded.tokenizer), self.ends)

    def now(self, number: int, prompts: list[int]) -> list[Worth]:
        """The answers of rollout `number` to these prompts, from the weights of now."""
        return self.drawing.over(lambda: self._worthy(number, prompts))

    def _worthy(self, number: int, prompts: list[int]) -> list[Worth]:
        self.drawing.writer.renew(number * self.node.rollout.steps)
        with self.run.stop.at_once("while answers are drawn"):  # all ranks ask together whether to stop
            return self.drawn(number, prompts)

    def drawn(self, number: int, prompts: list[int]) -> list[Worth]:
        """The answers of rollout `number`, from the weights that the engine has. Prompts of which nothing is learned
        give way to others, some times."""
        made = self._judged(number, 0, prompts)
        for turn in range(1, self.node.rollout.redraw + 1):
            able = [worth for worth in made if teaches(worth)]
            lacking = len(prompts) - len(able)
            taken = {worth.prompt for worth in made}
            order = keyed(mixed(self.node.seed, number, turn), 0, len(self.asked)).tolist()
            fresh = [i for i in order if i not in taken][:lacking]
            if not lacking or not fresh:
                break
            more = self._judged(number, turn, fresh)
            rest = [worth for worth in (*more, *made) if not teaches(worth)]
            made = [*able, *(worth for worth in more if teaches(worth)), *rest][: len(prompts)]
        return made

    def _judged(self, number: int, turn: int, prompts: Sequence[int]) -> list[Worth]:
        """Answers with their rewards: each rank draws its share of them, the main one judges all."""
        peers, drawn = self.run.peers, self._answers(number, turn, prompts)
        judged = self._score(number, prompts, drawn) if self.run.main else None
        total, each = peers.share(None if judged is None else [judged.total, judged.each])
        made, at = list[Worth](), 0
        for prompt, group in zip(prompts, drawn, strict=True):
            here, given = slice(at, at + len(group)), [answer.given for answer in group]
            told = {name: list(x[here]) for name, x in each.items()}
            told |= {"environment": given} if self.environment is not None else {}
            made.append(Worth(prompt, group, [x + y for x, y in zip(total[here], given, strict=True)], told))
            at += len(group)
        return made

    def _answers(self, number: int, turn: int, prompts: Sequence[int]) -> list[list[Answer]]:
        """Of all ranks, in the order of the prompts."""
        how, ranks = self.node.rollout, self.run.ranks
        at, shares = (ranks.rank, ranks.world) if not self.drawing.lone else (0, 1)
        mine = list(prompts[at::shares]) if ranks.rank < shares else []
        asks = self.asked, mine, how, self.node.data.max_length, seeds(self.node.seed, number, turn, mine)
        with asked_by("rollout", {"n": "rollout.group", "prompt": "data.max_length"}):
            if self.environment is None or self.speech is None:
                own = draw(self.drawing.writer, *asks, self.ends)
            else:
                own = converse(self.drawing.writer, *asks, self.speech, self.environment)
        parts = self.run.peers.gather([[answer.told() for answer in group] for group in own])
        return [[Answer.of(said) for said in parts[i % shares][i // shares]] for i in range(len(prompts))]

    def _score(self, number: int, prompts: Sequence[int], drawn: Sequence[Sequence[Answer]]) -> Scores:
        with self.run.peers.alone("data"):
            made = score(self.node.reward, samples(self.asked, prompts, drawn), self.bench)
        for name, count in made.failed.items():
            if count == len(made.total):
                what = f"reward {name} failed of all {count} answers, which have what its `failed` says"
                self.notice(name, f"rollout {number}: {what}")
        return made

    def notice(self, about: str, text: str) -> None:
        """Said once a run, by the main rank."""
        if self.run.main and about not in self.noticed:
            self.noticed.add(about)
            self.run.console.notice(text)


def teaches(worth: Worth) -> bool:
    """Whether a group's answers are not all worth the same."""
    return not bool(without_signal(torch.tensor(worth.total), torch.zeros(len(worth.total)).long()).any())
