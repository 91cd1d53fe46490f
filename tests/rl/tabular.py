"""Policies that are tables: a bandit of five arms and a toy of two moves, with their closed optima."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.core.types import Batch, Branches


@dataclass(frozen=True)
class Toy:
    """States have a row of actions each; an episode starts in state 0 and ends where no state follows."""

    follows: torch.Tensor
    """(S, A): the next state, or -1."""
    worth: torch.Tensor
    """(S, A): what an episode that ends with the action is worth."""
    reference: torch.Tensor
    """(S, A): logits."""

    def optimum(self, beta):
        """Of the episodes that a policy draws reward - beta KL(policy, reference) is largest for this: (S, A) laws."""
        logps = torch.log_softmax(self.reference, 1)
        values, law = torch.zeros(len(logps), dtype=logps.dtype), torch.zeros_like(logps)
        for state in reversed(range(len(logps))):  # what follows has a larger number
            nexts = self.follows[state]
            ahead = torch.where(nexts < 0, self.worth[state], values[nexts.clamp_min(0)])
            law[state] = torch.softmax(logps[state] + ahead / beta, 0)
            values[state] = beta * torch.logsumexp(logps[state] + ahead / beta, 0)
        return law

    def reach(self, law):
        """How often an episode comes to each state, (S,)."""
        made = torch.zeros(len(law), dtype=law.dtype)
        made[0] = 1
        for state in range(len(law)):
            for action, after in enumerate(self.follows[state].tolist()):
                if after >= 0:
                    made[after] += made[state] * law[state, action]
        return made

    def divergence(self, law, other):
        """KL of whole episodes under `law` from those under `other`."""
        return float((self.reach(law)[:, None] * law * (law.log() - other.log())).sum())

    def draw(self, law, episodes, generator):
        """(N,) states and actions of their moves, episode by episode; (N,) whose; (K,) what they are worth."""
        state, of = torch.zeros(episodes).long(), torch.arange(episodes)
        columns, worth = [], torch.zeros(episodes, dtype=law.dtype)
        while len(state):
            action = torch.multinomial(law[state], 1, generator=generator)[:, 0]
            columns.append(torch.stack([of, state, action]))
            after = self.follows[state, action]
            worth[of[after < 0]] = self.worth[state, action][after < 0]
            of, state = of[after >= 0], after[after >= 0]
        moves = torch.cat(columns, 1)
        order = torch.argsort(moves[0], stable=True)
        of, state, action = moves[:, order]
        return state, action, of, worth


def bandit():
    g = torch.Generator().manual_seed(0)
    worth, reference = torch.randn(2, 1, 5, generator=g, dtype=torch.float64)
    return Toy(torch.full((1, 5), -1), worth, reference)


def markov():
    """Three first moves, of which the last ends the episode, then three second ones."""
    g = torch.Generator().manual_seed(1)
    worth, reference = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    return Toy(torch.tensor([[1, 2, -1], [-1, -1, -1], [-1, -1, -1]]), worth, reference)


def batch_of(moves, of, group, per, each):
    """The moves as a batch of completions."""
    zeros = torch.zeros(1, moves).long()
    weights = torch.ones(1, moves, dtype=torch.float64)
    return Batch(zeros, zeros, zeros, weights, None, (0,), branches=Branches(of, group, per, each))
