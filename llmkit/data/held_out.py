"""A share of the training rows that is kept for validation: which rows they are depends on the rows alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from llmkit.data.rows import At, BadRow, Raw
from llmkit.data.source_nodes import Source


@dataclass(frozen=True)
class Side:
    """The rows of a source that are held out, or all others; rows that cannot be read are of the others."""

    source: Source
    share: float
    seed: int
    held: bool

    @property
    def columns(self) -> Mapping[str, str]:
        """What each of our columns is called there."""
        return self.source.columns

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each row of the side; places are the source's own."""
        for row in self.source.rows(after):
            if (isinstance(row, Raw) and self._chosen(row)) == self.held:
                yield row

    def files(self) -> dict[str, str]:
        """sha256 of each file that is read, by its path."""
        return self.source.files()

    def remote(self) -> bool:
        """Whether reading them asks a network."""
        return self.source.remote()

    def _chosen(self, row: Raw) -> bool:
        """Whether a row is held out: by a hash of its cluster, else of the row, so that equal rows are on one side;
        pieces of a document by its file."""
        cluster = row.values.get(self.columns.get("cluster", "cluster"))
        key = row.file if row.more or row.rest else row.values if cluster is None else str(cluster)
        text = json.dumps([self.seed, key], sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big") < self.share * (1 << 56)


@dataclass(frozen=True)
class FirstRows:
    """The first rows of a source, which is known by its marks: it is never read as a whole."""

    source: Source
    most: int

    @property
    def columns(self) -> Mapping[str, str]:
        """What each of our columns is called there."""
        return self.source.columns

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """The first rows."""
        return islice(self.source.rows(after), self.most)

    def files(self) -> dict[str, str]:
        """What each file is known by."""
        return self.source.marks()

    def remote(self) -> bool:
        """Whether reading them asks a network."""
        return self.source.remote()


Readable = Source | Side | FirstRows
"""What gives rows."""
