"""Answers that are drawn on ranks of their own: what those who train say to those who draw, and what they hear."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from torch import Tensor

from llmkit.core.errors import PeerError
from llmkit.core.peers import Apart, Peers, Whole
from llmkit.inference.request import Ask, Completion, Output, Prompt, RequestError, Token
from llmkit.inference.sampling import Sampling
from llmkit.inference.writer import Writer
from llmkit.parallel.chunks import Lying, Route
from llmkit.rl.sync import Feeding, agreed

HOST = "cpu"
"""Where messages between both lie: neither has to know of the other's device."""
PLAIN = Sampling()
SCALARS = (bool, int, float, str, type(None))


class Word(NamedTuple):
    """What those who draw are told next: a version of the weights comes, or prompts do, or, with neither, the end."""

    version: int | None = None
    asks: Sequence[Any] | None = None


class Elsewhere:
    """The ranks that draw, as those that train see them: the main one alone asks."""

    def __init__(self, apart: Apart, feeding: Feeding, heard: Callable[[str], None]) -> None:
        """`heard`: is told why one of those that draw was asked to stop."""
        self.desk, self.feeding, self.heard = apart.desk, feeding, heard
        self.version: int | None = None
        """None before the first, and after one that did not arrive whole."""

    def renew(self, version: int) -> None:
        """The weights are of this version from now on: called by every rank that trains.

        Raises:
            PeerError: another rank is at another version.
        """
        self.version = None
        self._say(Word(version=version))
        self.feeding(version)
        self.version = version

    def each(self, asks: Iterable[Ask]) -> Iterator[Completion]:
        """A completion for each ask, in their order.

        Raises:
            PeerError: the weights are not there.
        """
        told = [ask_told(ask) for ask in asks]
        if not told:
            return
        if self.version is None or self.desk is None:
            raise PeerError("no rank draws from weights of a known version", fix="go on from the last checkpoint")
        self._say(Word(asks=told))
        said = self.desk.gather(None)[1:]
        for why, _ in said:
            if why:
                self.heard(why)
        parts = [made for _, made in said]
        for at in range(len(told)):
            yield completion_of(parts[at % len(parts)][at // len(parts)])

    def end(self) -> None:
        """Nobody asks any more."""
        self._say(Word())

    def close(self) -> None:
        """Of a run that ends by a fault, the watch tells those who draw."""

    def _say(self, word: Word) -> None:
        if self.desk is not None:
            self.desk.share(word)


def answer(desk: Peers, renew: Callable[[int], None], writer: Writer, why: Callable[[], str]) -> None:
    """Draws what is asked, until nobody asks any more; `why`: this process was asked to stop."""
    mine, others = desk.ranks.rank - 1, desk.ranks.world - 1
    while (word := Word(*desk.share(None))) != Word():
        if word.version is not None:
            renew(word.version)
        elif word.asks is not None:
            asks = [ask_of(said) for said in word.asks[mine::others]]
            made = [completion_told(one) for one in writer.each(asks)]
            desk.gather([why(), made])


class Crossing:
    """Weights on their way from ranks that train to models of ranks that draw."""

    def __init__(self, whole: Whole, lying: Lying, held: Iterable[str], into: Mapping[str, Tensor]) -> None:
        """`held`: what is trained here, by its names; `into`: the tensors here that it goes into, by the same.

        Raises:
            PeerError: those who draw lack a tensor that is trained, or have another.
        """
        self.whole, self.lying, self.into = whole, lying, into
        said = whole.gather([sorted(held), sorted(into)])
        wanted = next(names for _, names in said if names)
        _check(said, wanted)
        names = [name for name in held if name in wanted]
        self.route = Route(whole, names, lying, takes=bool(into))

    def __call__(self, version: int) -> None:
        """All that is trained, message by message.

        Raises:
            PeerError: another rank is at another version.
        """
        agreed(self.whole, version)
        self.route.follow(self.lying, self.into, HOST, self.whole.spread)


def _check(said: Sequence[Any], wanted: Sequence[str]) -> None:
    """Each rank's names of what is trained there and of what is drawn from, beside those that are drawn from.

    Raises:
        PeerError: they do not go together; it names a rank and a tensor.
    """
    given, drawn = {name for names, _ in said for name in names}, {*wanted}
    for rank, (_, names) in enumerate(said):
        if untrained := sorted({*names} - given):
            raise PeerError(f"rank {rank} draws from {untrained[0]}, which no rank trains", fix="report it")
        if names and (odd := sorted(drawn ^ {*names})):
            which = "does not draw" if odd[0] in drawn else "alone draws"
            raise PeerError(f"rank {rank} {which} from {odd[0]}, which is trained", fix="report it")


def ask_told(ask: Ask) -> list[Any]:
    """As JSON has it: of the prompt the tokens, which are all that an engine reads of it, and of the rest what is not
    as it comes.

    Raises:
        RequestError: something of it does not travel, or what it asks for does not come back; it is named.
    """
    return [ask.prompt.ids, _changed(ask.sampling, PLAIN), _changed(ask, Ask(ask.prompt, ask.sampling))]


def _changed(asked: Any, plain: Any) -> dict[str, Any]:
    """The fields of one that are not as another has them."""
    pairs = ((field.name, getattr(asked, field.name), getattr(plain, field.name)) for field in fields(plain))
    found = {name: value for name, value, usual in pairs if value != usual}
    for name in (name for name, value in found.items() if not _travels(name, value)):
        what = "is not told to ranks that only draw, nor what comes of it by them"
        raise RequestError(what, fix="leave it out, or set rollout.ranks=0", key=name)
    return found


def _travels(name: str, value: Any) -> bool:
    """Whether JSON has it as it is, and completions have what it asks for."""
    if name == "prompt_logprobs" or (name == "logprobs" and value):
        return False
    return all(isinstance(one, SCALARS) for one in (value if isinstance(value, tuple) else (value,)))


def ask_of(said: Sequence[Any]) -> Ask:
    """From JSON."""
    ids, how, more = said
    return Ask(Prompt(tuple(ids)), Sampling(**_plain(how)), **_plain(more))


def _plain(said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}


def completion_told(made: Completion) -> list[Any]:
    """As JSON has it, without the likeliest of other tokens, which no ask that is told asks for."""
    outputs = [
        [one.text, one.token_ids, one.finish_reason, one.stop_reason, one.why, [*map(_token_told, one.logprobs)]]
        for one in made.outputs
    ]
    return [outputs, made.prompt_tokens, made.cached_tokens, made.version]


def completion_of(said: Sequence[Any]) -> Completion:
    """From JSON."""
    outputs, prompt, cached, version = said
    made = tuple(
        Output(text, tuple(ids), finish, tuple(Token(*one) for one in tokens), stop, why)
        for text, ids, finish, stop, why, tokens in outputs
    )
    return Completion(made, prompt, cached_tokens=cached, version=version)


def _token_told(token: Token) -> list[Any]:
    return [token.id, token.logprob, token.sampling_logprob]
