"""Blocks of a paged cache by number: who holds them, which are free, which may be found again. No tensors.

A full block is named by a keyed hash of all tokens up to its end (a chain, so that a block stands for its whole
prefix) and of a salt: the tenant, the adapter and the version of the weights. Freed blocks keep their names until they
are needed for something else, the longest unused first (PagedAttention, arXiv:2309.06180; prefix caching as in vLLM).
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Sequence

KEY = secrets.token_bytes(32)
"""Of this process: nobody outside can make two prefixes of one name."""


def chain(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a block of `tokens` after the prefix named `before`."""
    body = b"".join(token.to_bytes(4, "little") for token in tokens)
    return hashlib.blake2b(before + body, key=KEY, digest_size=32).digest()


def salted(*parts: str) -> bytes:
    """The name of the empty prefix: blocks are found under the same parts alone."""
    body = b"".join(len(part.encode()).to_bytes(4, "little") + part.encode() for part in parts)
    return hashlib.blake2b(body, key=KEY, digest_size=32).digest()


class Blocks:
    """`count` blocks of `size` tokens each."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.holders = [0] * count
        self.names: list[bytes | None] = [None] * count
        self.found: dict[bytes, int] = {}
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        """Those that nobody holds, the longest unused first."""

    @property
    def room(self) -> int:
        """How many blocks nobody holds."""
        return len(self.free)

    def take(self, count: int) -> list[int]:
        """New blocks, each held once.

        Raises:
            ValueError: there are not so many.
        """
        if count > len(self.free):
            raise ValueError(f"{count} blocks are asked for, {len(self.free)} are free")
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._forget(block)
            self.holders[block] = 1
        return taken

    def share(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of `names` that is here, each held once more."""
        shared = []
        for name in names:
            block = self.found.get(name)
            if block is None:
                break
            self.hold(block)
            shared.append(block)
        return shared

    def hold(self, block: int) -> None:
        """One more holds a block."""
        if self.holders[block] == 0:
            del self.free[block]
        self.holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less of each; of those that nobody holds any longer the last are used again first, since a
        prefix is of use only as a whole."""
        for block in reversed(blocks):
            if self.holders[block] <= 0:
                raise ValueError(f"block {block} is held by nobody")
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self.free[block] = None
                if self.names[block] is None:
                    self.free.move_to_end(block, last=False)

    def publish(self, block: int, name: bytes) -> None:
        """A full block may be found by its name from now on; where another has it already, that one is kept."""
        if name not in self.found and self.names[block] is None:
            self.found[name] = block
            self.names[block] = name

    def forget(self) -> None:
        """No block is found any longer: the weights are others."""
        self.found.clear()
        self.names = [None] * self.count

    def _forget(self, block: int) -> None:
        name, self.names[block] = self.names[block], None
        if name is not None:
            del self.found[name]
