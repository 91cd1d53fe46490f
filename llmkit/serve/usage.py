"""How many tokens an answer took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmkit.inference.request import Event


@dataclass
class Usage:
    """Tokens, over all answers to one prompt."""

    prompt: int
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    drafted: int = 0
    """Drafts of the answers that were looked at."""
    accepted: int = 0
    """Those of them that are in the answers."""
    steps: int = 0
    """That made the answers, each answer's by itself."""

    def take(self, event: Event) -> None:
        """Counts what an event brings; the token that ends an answer is one that was made."""
        self.completion += len(event.tokens)
        self.cached = max(self.cached, event.cached)
        self.drafted += event.drafted
        self.accepted += event.accepted
        self.steps += event.steps

    def add(self, other: Usage) -> None:
        """Those of another prompt too."""
        self.prompt += other.prompt
        self.completion += other.completion
        self.cached += other.cached
        self.reasoning += other.reasoning
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.steps += other.steps

    def told(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning,
                **self.predicted,
            },
        }

    @property
    def predicted(self) -> dict[str, int]:
        """What of drafts is told with an answer."""
        rejected = self.drafted - self.accepted
        return {"accepted_prediction_tokens": self.accepted, "rejected_prediction_tokens": rejected}
