"""The two ends of the watch: the main rank hears all others and judges; the others hear it, and judge it alone."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any, Protocol

from llmkit.core.ranks import Ranks
from llmkit.parallel.judge import QUIET, Fault, Seen, Verdict, hung, verdict
from llmkit.parallel.line import Line
from llmkit.parallel.where import Where

SILENT = 10.0
"""Seconds that a rank may be silent for which a request waits."""
STILL = 20.0
"""Seconds that it may stand still, while the main rank waits for it."""
STRANGER = 10.0
"""Seconds that a connection may take to say who it is."""

NEAR = 32
"""Ranks that tell every change of phase at once; of more, what they tell in their beats is enough."""


class Post(Protocol):
    """What the thread of a rank keeps."""

    complete: bool
    """Every rank has come."""
    over: bool
    """Every rank has ended well: nothing that happens now is a fault."""
    orphan: bool
    """The main rank is to blame: who is left does what it would have done."""

    def sockets(self) -> Iterator[socket.socket]:
        """What something may come from."""
        ...

    def turn(self, now: float) -> Verdict | None:
        """Reads what has come, and judges."""
        ...

    def beat(self, now: float) -> None:
        """Says where this rank is."""
        ...

    def moved(self) -> None:
        """Says, at once, that this rank is elsewhere; called by the main thread."""
        ...

    def fault(self, code: int, lines: tuple[str, ...], now: float) -> None:
        """This rank ends by a fault, and tells the others."""
        ...

    def end(self, found: Verdict) -> None:
        """Tells the others, where they hear it from here."""
        ...

    def leave(self) -> None:
        """This rank ends well."""
        ...

    def forgive(self, now: float) -> None:
        """This process was stopped itself: what it did not hear counts for nothing."""
        ...

    def patient(self) -> None:
        """The main rank may leave the others waiting as long as it likes."""
        ...

    def close(self) -> None:
        """Hangs up, without a word."""
        ...

    def speaks(self, found: Verdict) -> int:
        """How many ranks there may be that speak before this one; -1 where it does not."""
        ...


class Hub:
    """The main rank's post."""

    orphan = False

    def __init__(self, ranks: Ranks, where: Where, host: str, bound: str, patience: float) -> None:
        family = socket.AF_INET6 if ":" in bound else socket.AF_INET
        self.listening = socket.create_server((bound, 0), family=family, backlog=min(4096, ranks.world + 16))
        self.listening.setblocking(False)
        self.token = secrets.token_hex(16)
        self.world, self.where, self.patience, self.silence = ranks.world, where, patience, QUIET
        self.began, self.complete, self.over, self.leaving = time.monotonic(), ranks.world == 1, False, False
        self.me = Seen(0, ranks.name, host, ranks.pid, self.began, self.began, self.began)
        self.seen, self.faults = {0: self.me}, list[Fault]()
        self.lines, self.strangers = dict[int, Line](), list[tuple[Line, float]]()

    @property
    def address(self) -> dict[str, Any]:
        """Where the others find it, and what lets them in."""
        host, port = self.listening.getsockname()[:2]
        return {"host": host, "port": port, "token": self.token}

    def sockets(self) -> Iterator[socket.socket]:
        """What something may come from."""
        yield self.listening
        yield from (line.socket for line, _ in self.strangers)
        yield from (line.socket for line in self.lines.values() if not line.lost)

    def turn(self, now: float) -> Verdict | None:
        """Reads what has come, and judges."""
        self._accept(now)
        for rank, line in self.lines.items():
            for said in line.hear():
                self._heard(self.seen[rank], said, now)
            self.seen[rank].lost |= line.lost
        if self.where.count != self.me.last["count"]:
            self.me.moved(self.where.place, now)
        if self.leaving:
            self.over = self._alone()
            return None
        if not self.complete and now - self.began > self.patience:
            missing = ", ".join(str(rank) for rank in range(self.world) if rank not in self.seen)
            what = f"rank {missing} of {self.world} did not come in {self.patience:.0f} s"
            return Verdict(6, (f"{what}; fix: start all ranks by one launcher",), int(missing.split(",")[0]))
        found = verdict(self.seen, self.faults, now, self.where.median, self.silence)
        return found or hung(self.seen, now, self.where.median, self.patience)

    def _accept(self, now: float) -> None:
        try:
            while True:
                self.strangers.append((Line(self.listening.accept()[0]), now))
        except OSError:  # nobody is there; or one who left at once; or there is no room for one more
            pass
        left = []
        for line, since in self.strangers:
            said = list(line.hear())
            if not said and not line.lost and now - since < STRANGER:
                left.append((line, since))
            elif not said or not self._welcome(line, said[0], now):
                line.close()
            else:
                for more in said[1:]:
                    self._heard(self.seen[said[0]["rank"]], more, now)
        self.strangers = left

    def _welcome(self, line: Line, said: Any, now: float) -> bool:
        """Whether it is one of the ranks, and the first of its number."""
        known = isinstance(said, dict) and said.get("token") == self.token
        if not known or said["rank"] in self.seen:
            return False
        one = Seen(said["rank"], said["name"], said["host"], said["pid"], now, now, now)
        one.near = self.patience if one.host == self.me.host else 0.0
        self.seen[one.rank] = one
        self.lines[said["rank"]] = line
        if len(self.seen) == self.world:
            self.complete = True
            for one in self.seen.values():
                one.forgive(now)
            self._tell({"all": True})
        return True

    def _heard(self, one: Seen, said: dict[str, Any], now: float) -> None:
        if "beat" in said:
            one.beat(said["beat"], now)
        if "at" in said:
            one.moved(said["at"], now)
        if "fault" in said:
            self.faults.append(Fault(one.rank, said["fault"], tuple(said["lines"]), now))
            one.gone = True
        if "bye" in said:
            one.gone = True

    def _alone(self) -> bool:
        return all(one.gone or one.lost for one in self.seen.values() if one.rank)

    def _tell(self, value: Any) -> None:
        for line in self.lines.values():
            line.say(value)

    def beat(self, now: float) -> None:
        """Says where this rank is, and who is left."""
        self.me.beat(self.where.said(), now)
        here = [rank for rank, one in self.seen.items() if not (one.gone or one.lost)]
        self._tell({"beat": self.me.last, "here": here})

    def moved(self) -> None:
        """Says, at once, that this rank is elsewhere; called by the main thread."""
        if self.complete and self.world <= NEAR:
            self._tell({"at": self.where.place})

    def fault(self, code: int, lines: tuple[str, ...], now: float) -> None:
        """This rank ends by a fault, and tells the others when it is judged."""
        self.me.gone = True
        self.faults.append(Fault(0, code, lines, now))

    def end(self, found: Verdict) -> None:
        """All ranks are told."""
        self._tell({"end": found.said()})

    def leave(self) -> None:
        """It stays until the others have left."""
        self.leaving = True
        self.over = self._alone()

    def forgive(self, now: float) -> None:
        """This process was stopped itself: what it did not hear counts for nothing."""
        for one in self.seen.values():
            one.forgive(now)

    def patient(self) -> None:
        """The main rank may leave the others waiting as long as it likes; they may not leave it."""
        self.patience, self.silence, self.me.at_leisure = STILL, SILENT, True

    def close(self) -> None:
        """Hangs up, without a word."""
        for each in [*self.lines.values(), *(line for line, _ in self.strangers)]:
            each.close()
        self.listening.close()

    def speaks(self, found: Verdict) -> int:
        """The main rank speaks, but for its own faults, which its command line tells."""
        return -1 if found.rank == 0 and not found.hangs else 0


class Spoke:
    """The post of any other rank."""

    def __init__(self, ranks: Ranks, where: Where, host: str, hub: dict[str, Any], within: float) -> None:
        self.line = Line(socket.create_connection((hub["host"], hub["port"]), timeout=within))
        self.line.say({"token": hub["token"], "rank": ranks.rank, "name": ranks.name, "host": host, "pid": ranks.pid})
        now = time.monotonic()
        self.main = Seen(0, hub["name"], hub["node"], hub["pid"], now, now, now)
        self.main.near = within if hub["node"] == host else 0.0
        self.rank, self.where, self.here = ranks.rank, where, list(range(ranks.world))
        self.complete = self.over = self.orphan = False
        self.told: Verdict | None = None

    def sockets(self) -> Iterator[socket.socket]:
        """What something may come from."""
        if not self.line.lost:
            yield self.line.socket

    def turn(self, now: float) -> Verdict | None:
        """Reads what has come; judges the main rank."""
        for said in self.line.hear():
            self.complete |= "all" in said
            if "beat" in said:
                self.main.beat(said["beat"], now)
                self.here = said["here"]
            if "at" in said:
                self.main.moved(said["at"], now)
            if "end" in said:
                self.told = Verdict.heard(said["end"])
        if self.told is not None or self.over:
            return self.told
        found = self.main.died() if self.line.lost else self.main.silent(now, self.where.median)
        self.orphan = found is not None
        return found

    def beat(self, now: float) -> None:
        """Says where this rank is."""
        self.line.say({"beat": self.where.said()})

    def moved(self) -> None:
        """Says, at once, that this rank is elsewhere; called by the main thread."""
        if len(self.here) <= NEAR:
            self.line.say({"at": self.where.place})

    def fault(self, code: int, lines: tuple[str, ...], now: float) -> None:
        """This rank ends by a fault, and tells the main one."""
        self.line.say({"fault": code, "lines": lines})

    def end(self, found: Verdict) -> None:
        """A main rank that was only silent hears why the others are gone, if it ever goes on."""
        if self.orphan:
            self.line.say({"fault": found.code, "lines": found.lines})

    def leave(self) -> None:
        """It needs nobody any more."""
        self.line.say({"bye": True})
        self.over = True

    def forgive(self, now: float) -> None:
        """This process was stopped itself: what it did not hear counts for nothing."""
        self.main.forgive(now)

    def patient(self) -> None:
        """It hears whether the main rank lives, and judges nothing else."""

    def close(self) -> None:
        """Hangs up, without a word."""
        self.line.close()

    def speaks(self, found: Verdict) -> int:
        """The lowest rank that is left speaks for a main one that cannot."""
        return sum(0 < rank < self.rank for rank in self.here) if self.orphan else -1
