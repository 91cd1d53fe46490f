"""Whose turn it is: each tenant's account of what it was given, and the queue that the least served leads.

A tenant's counter rises by what is computed for it, divided by its weight; the one with the least counter is next. One
that comes back after a while starts where the others are, so that nobody saves turns up (virtual token counters,
arXiv:2401.00588), but for what two steps compute: a prompt that comes in the midst of one is read to its end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmkit.inference.heap import Heap
from llmkit.inference.sequence import Sequence

MADE = 2.0
"""What a token that is made counts beside one of a prompt, as in the paper: it costs a step."""
ABOUT = 60.0
"""Seconds for which a tenant that has nothing here any longer is about still: it may come again at any moment."""


@dataclass(eq=False)
class Account:
    """Of one tenant, while it has anything here or is ahead of the others."""

    weight: float
    counter: float
    present: int = 0
    """Sequences that wait or run."""
    slots: int = 0
    """Answers that run, counted as `Sequence.width` does."""


class Accounts:
    """Of all tenants."""

    def __init__(self, weights: Mapping[str, float], credit: float = 0.0) -> None:
        """`credit`: how far behind the others one may be that comes."""
        self.weights, self.credit = weights, credit
        self.accounts: dict[str, Account] = {}
        self.floor = 0.0
        """What a counter is at least: the least of all that are served, less the credit."""
        self.weight = 0.0
        """Of all that have anything here."""
        self.ahead: Heap[str] = Heap()
        """Those that have nothing here, by their counters; their accounts go once the others have caught up."""
        self.present = 0
        """Sequences of all."""
        self.here = 0
        """Tenants that have anything here."""
        self.left: OrderedDict[str, float] = OrderedDict()
        """Those that had lately: when the last of it ended, the longest ago first."""
        self.now = 0.0

    def __getitem__(self, one: Sequence) -> Account:
        return self.accounts[one.request.tenant]

    def enter(self, one: Sequence) -> None:
        """A sequence came."""
        tenant = one.request.tenant
        account = self.accounts.get(tenant)
        if account is None:
            account = self.accounts[tenant] = Account(self.weights.get(tenant, 1.0), self.floor)
        if account.present == 0:
            account.weight, account.counter = self.weights.get(tenant, 1.0), max(account.counter, self.floor)
            self.weight += account.weight
            self.here += 1
            self.left.pop(tenant, None)
            if tenant in self.ahead:
                self.ahead.drop(tenant)
        account.present, self.present = account.present + 1, self.present + 1

    def leave(self, one: Sequence) -> None:
        """A sequence has ended."""
        account = self[one]
        account.present, self.present = account.present - 1, self.present - 1
        if account.present == 0:
            self.weight -= account.weight
            self.here -= 1
            self.left[one.request.tenant] = self.now
            self.ahead.push((account.counter,), one.request.tenant)

    def charge(self, one: Sequence, end: int) -> None:
        """Tokens up to `end` are computed; what is computed again is not charged again."""
        start, prompt = max(one.charged, one.cached), len(one.tokens) - one.made
        if end > start:
            made = max(0, end - max(start, prompt))
            self[one].counter += (end - start - made + MADE * made) / self[one].weight
            one.charged = end

    @property
    def several(self) -> bool:
        """Whether more than one tenant is about."""
        return self.here + len(self.left) > 1

    def rise(self, served: Iterable[Sequence], now: float) -> None:
        """A step begins; `served`: of every tenant that is served or is next, one."""
        self.now = now
        while self.left and next(iter(self.left.values())) < now - ABOUT:
            self.left.popitem(last=False)
        least = min((self[one].counter for one in served), default=0.0)
        self.floor = max(self.floor, least - self.credit)
        while (first := self.ahead.first()) is not None and first[0][0] <= self.floor:
            self.ahead.drop(first[1])
            del self.accounts[first[1]]

    def share(self, one: Sequence, of: int) -> float:
        """The part of `of` that is its tenant's while all that are here want it; one at least."""
        return max(1.0, of * self[one].weight / self.weight)

    def asks(self, one: Sequence) -> float:
        """How much its tenant has here, by its weight."""
        return self[one].present / self[one].weight

    def floods(self, one: Sequence) -> bool:
        """Whether its tenant has more here than all others together."""
        return 2 * self[one].present > self.present


class Queue:
    """Sequences that wait: the least served tenant's first, of one tenant those of the least `priority` number."""

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self.lines: dict[str, Heap[Sequence]] = {}
        self.tenants: Heap[str] = Heap()
        """Those with a line, by their counters as these were; a counter only rises."""
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __contains__(self, one: Sequence) -> bool:
        return one in self.lines.get(one.request.tenant, ())

    def push(self, one: Sequence) -> None:
        """One more waits."""
        tenant = one.request.tenant
        if tenant not in self.lines:
            self.lines[tenant] = Heap()
            self.tenants.push((self.accounts[one].counter, one.order), tenant)
        self.lines[tenant].push(rank(one), one)
        self.count += 1

    def drop(self, one: Sequence) -> None:
        """It waits no longer."""
        line = self.lines[one.request.tenant]
        line.drop(one)
        self.count -= 1
        if not line:
            del self.lines[one.request.tenant]
            self.tenants.drop(one.request.tenant)

    def first(self) -> Sequence | None:
        """Whose turn it is; it stays."""
        while (least := self.tenants.first()) is not None:
            key, tenant = least
            ahead = self.lines[tenant].first()
            counter = self.accounts.accounts[tenant].counter
            if ahead is not None and counter <= key[0]:
                return ahead[1]
            self.tenants.push((counter, *key[1:]), tenant)
        return None


def rank(one: Sequence) -> tuple[float, ...]:
    """Of a sequence among those of its tenant: the least is first."""
    return one.rests, one.request.priority, one.order
