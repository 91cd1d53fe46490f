"""What an engine tells of itself, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkit.inference.speculation.most import MOST


@dataclass(frozen=True)
class Stats:
    """One moment of an engine: what is there now, and what was counted since it began."""

    version: int
    """Of the weights."""
    queued: int
    """Answers that wait for room; those of one request that have not parted yet count as one."""
    running: int
    """Answers that hold blocks."""
    blocks: int
    used: int
    """Blocks that somebody holds."""
    looked: int
    """Tokens of prompts that were looked for in the cache, counted when they began."""
    hits: int
    """Those of them that were there."""
    preempted: int
    """Times that blocks were given back to be computed again."""
    requests: int
    """Taken on."""
    dropped: int
    """Requests whose deadline passed before they began."""
    late: int
    """Answers that their deadline ended, those that were dropped included."""
    aborted: int
    """Requests that nobody waited for any longer."""
    failed: int
    """Requests that ended by a fault of their own."""
    finished: int
    """Answers that came to their end."""
    read: int
    """Tokens of prompts that were computed, those that were computed again included."""
    made: int
    """Tokens that were made."""
    drafted: int
    """Drafts that were looked at."""
    accepted: int
    """Those of them that were what was chosen."""
    kept: tuple[int, ...]
    """How often a look at drafts kept none of them, one, two ...: its sum is how often there were any."""
    steps: int
    seconds: float
    """That steps took, drafting included."""
    drafting: float
    """Seconds of it that drafting took."""
    verifying: float
    """Seconds that steps took in which drafts were looked at, but for drafting."""
    fallen: tuple[str, ...]
    """Of each that drafted, failed and was given up, who it was and of what it failed."""


@dataclass
class Tally:
    """What the engine counts."""

    requests: int = 0
    late: int = 0
    aborted: int = 0
    failed: int = 0
    finished: int = 0
    read: int = 0
    made: int = 0
    drafted: int = 0
    accepted: int = 0
    kept: list[int] = field(default_factory=lambda: [0] * (MOST + 1))
    steps: int = 0
    seconds: float = 0.0
    drafting: float = 0.0
    verifying: float = 0.0

    def look(self, drafted: int, accepted: int) -> None:
        """So many drafts of one answer were looked at, and so many kept."""
        self.drafted += drafted
        self.accepted += accepted
        self.kept[accepted] += 1
