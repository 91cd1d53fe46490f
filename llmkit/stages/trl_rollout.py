"""Answers for a trainer of TRL by llmkit's engine, and what they are worth by llmkit's rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from llmkit.build.held import Here
from llmkit.build.training import Built
from llmkit.core.errors import RecipeError
from llmkit.core.seed import mixed
from llmkit.data.prompt import prompt_ids
from llmkit.data.render import Renderer
from llmkit.inference.cache import Cache
from llmkit.inference.generate import ends
from llmkit.inference.node import OwnEngine
from llmkit.inference.request import Ask, Prompt, ended, telling
from llmkit.inference.sampling import Sampling
from llmkit.rl.bench import Bench
from llmkit.rl.rewards_node import Reward, names
from llmkit.rl.sample import Sample
from llmkit.rl.scoring import score

BLOCK = Cache().block
UNSAID = ("generation_kwargs", "cache_implementation", "use_transformers_paged", "use_transformers_continuous_batching")
"""Arguments of transformers' own generation."""


class Rollouts:
    """A trainer's `rollout_func`: the engine over the weights of that moment. What is drawn follows from the seed, the
    step and the place of a prompt."""

    def __init__(self, built: Built, seed: int) -> None:
        self.built, self.seed = built, seed
        self.renderer = Renderer(built.loaded.tokenizer)
        self.last, self.calls = -1, 0

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """Tokens of prompts and of answers; the trainer computes log-probabilities itself."""
        step = int(trainer.state.global_step)
        self.last, self.calls = step, self.calls + 1 if step == self.last else 0
        loaded = self.built.loaded
        sampling = telling(_sampling(trainer.args), ends(loaded.model, loaded.tokenizer))
        asked = [prompt_ids(self.renderer, prompt) for prompt in prompts]
        seeds = [mixed(self.seed, step, self.calls, at) for at in range(len(asked))]
        asks = [Ask(Prompt(tuple(ids)), replace(sampling, seed=own)) for ids, own in zip(asked, seeds, strict=True)]
        return {"prompt_ids": asked, "completion_ids": self._written(asks, sampling.max_tokens), "logprobs": None}

    def _written(self, asks: Sequence[Ask], most: int) -> list[list[int]]:
        model, loaded = self.built.model, self.built.loaded
        need = sum(-(-(len(ask.prompt.ids) + most) // BLOCK) * BLOCK for ask in asks)
        training = model.training
        model.eval()
        try:
            with closing(OwnEngine().open(Here(loaded, model, most=need))) as writer:
                return [ended(one.sound()) for one in writer.each(asks)]
        finally:
            model.train(training)


def _sampling(args: Any) -> Sampling:
    """What the trainer's arguments say of answers.

    Raises:
        RecipeError: they say something to transformers' generation alone.
    """
    for name in UNSAID:
        if getattr(args, name, None):
            what = "is for transformers' own generation, and the engine writes answers"
            raise RecipeError(what, fix="drop it, or set engine: false", key=f"arguments.{name}")
    return Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=max(0, args.top_k or 0),
        min_p=args.min_p or 0.0,
        repetition_penalty=args.repetition_penalty,
        max_tokens=args.max_completion_length,
    )


def reward_functions(rewards: Sequence[Reward], bench: Bench) -> list[Callable[..., list[float]]]:
    """Each reward as a trainer calls it; one that fails ends the run, with the answer that it failed on."""
    made = [_function(reward, name, f"reward.{at}", bench) for at, (reward, name) in enumerate(_named(rewards))]
    for reward, name in _named(rewards):
        score((reward,), (), bench, name)  # what is missing is told before anything is made
    return made


def _named(rewards: Sequence[Reward]) -> list[tuple[Reward, str]]:
    return list(zip(rewards, names(rewards), strict=True))


def _function(reward: Reward, name: str, key: str, bench: Bench) -> Callable[..., list[float]]:
    def worth(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        both = zip(prompts, completions, strict=True)
        samples = [_sample(at, prompt, said, columns) for at, (prompt, said) in enumerate(both)]
        (scores,) = score((reward,), samples, bench, key).each.values()
        return list(scores)

    worth.__name__ = name
    return worth


def _sample(at: int, prompt: Any, said: Any, columns: Mapping[str, Any]) -> Sample:
    """One answer as rewards take it."""
    row = {n: x[at] for n, x in columns.items() if isinstance(x, list | tuple) and n != "completion_ids"}
    ids = tuple(columns["completion_ids"][at]) if "completion_ids" in columns else ()
    asked = prompt if isinstance(prompt, str) else tuple(prompt)
    text = said if isinstance(said, str) else str(said[-1].get("content") or "")
    return Sample(asked, text, ids, row=row)
