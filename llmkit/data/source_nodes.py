"""The sources of rows: each a recipe node whose verbs give its rows, and the files that they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from llmkit.core.config import Conflict, Later, config, setting
from llmkit.data.mix import Weight

if TYPE_CHECKING:
    from llmkit.data.rows import At, BadRow, Raw

TEXTS = ("messages", "prompt", "completion", "text", "tools", "transcript")
CHATS = ("instruction", "input", "output")
"""Of rows that are a question and its answer, as Alpaca has them: a conversation is made of them."""
COMPARED = ("chosen", "rejected", "margin", "completions", "labels")
"""Of rows that are completions of one prompt."""
COLUMNS = (*TEXTS, *CHATS, *COMPARED, "cluster", "choices", "label", "tokens", "tags", "group", "answer")
"""Our names of columns."""

Encoding = Literal[
    "utf-8", "latin-1", "cp1250", "cp1251", "cp1252", "koi8-r", "gb18030", "big5", "shift_jis", "euc_jp", "euc_kr"
]
"""Encodings of text, in all of which a line ends in the same byte."""


def unknown(columns: Mapping[str, str]) -> Iterator[Conflict]:
    """Names of columns that nothing reads."""
    for name in columns:
        if name not in COLUMNS:
            yield Conflict(f"columns.{name}", "is no column of ours", f"use one of {', '.join(COLUMNS)}")


@config
class Files:
    """Rows of one file after the other."""

    kind: str = ""
    path: str | tuple[str, ...]
    """A file, a glob (`rows/*.jsonl`), whose files are read in the order of their names, or a list of these; here or
    in a store (`s3://bucket/rows.jsonl`, through fsspec)."""
    columns: Mapping[str, str] = setting(default_factory=dict)
    """What each of our columns is called in the file: `{prompt: question, completion: answer}`."""
    take: int | None = setting(default=None, least=1)
    """The first so many rows; all of them when not given."""
    weight: Weight | None = None
    """Its share of the mix, relative to the others'; or points `[[0, 1.0], [0.5, 0.2]]`: parts of the run and the share
    there, with straight lines between them."""

    def problems(self) -> Iterator[Conflict]:
        """Names in `columns` that nothing reads."""
        yield from unknown(self.columns)

    def files(self) -> dict[str, str]:
        """sha256 of each file that is read, by its path."""
        from llmkit.data.sources import digests

        return digests(self.path)

    def marks(self) -> dict[str, str]:
        """Size and sha256 of both ends of each file, by its path: what a stream is known by."""
        from llmkit.data.sources import marks

        return marks(self.path)

    def here(self) -> list[str]:
        """The files of this machine that are read, as far as there are any."""
        from llmkit.data.stores import found_here

        return found_here(self.path)

    def remote(self) -> bool:
        """Whether a path is a store's."""
        return any("://" in path for path in ([self.path] if isinstance(self.path, str) else self.path))


@config
class Jsonl(Files):
    """One JSON object a line."""

    kind: Literal["jsonl"] = "jsonl"

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each object, or the error that its line is; begins behind the row `after` at once."""
        from llmkit.data.jsonl import read_jsonl
        from llmkit.data.sources import chained

        return chained(self.path, read_jsonl, after, self.take)


@config
class Json(Files):
    """One JSON list of objects."""

    kind: Literal["json"] = "json"

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each object, or the error that it is; begins behind the row `after` at once."""
        from llmkit.data.json_list import read_json
        from llmkit.data.sources import chained

        return chained(self.path, read_json, after, self.take)


@config
class Parquet(Files):
    """A parquet file, read in record batches (needs `pip install pyarrow`)."""

    kind: Literal["parquet"] = "parquet"

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each row of the file; begins behind the row `after` within its row group's size."""
        from llmkit.data.parquet import read_parquet
        from llmkit.data.sources import chained

        return chained(self.path, read_parquet, after, self.take)


@config
class Csv(Files):
    """A table as text: the names of the columns in its first line, then a row a line, quoted as in RFC 4180."""

    kind: Literal["csv"] = "csv"
    delimiter: str | None = None
    """One character; a tab for files that are named `.tsv`, else a comma."""
    names: tuple[str, ...] = ()
    """The names of the columns, where the file has no line with them."""
    encoding: Encoding = "utf-8"

    def problems(self) -> Iterator[Conflict]:
        """A delimiter that is none."""
        yield from Files.problems(self)
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n\0'):
            yield Conflict("delimiter", f"{self.delimiter!r} is not one character", 'use "," or "\\t"')
        if len(set(self.names)) < len(self.names):
            yield Conflict("names", "names a column twice", "name each column once")

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each row, or the error that it is; begins behind the row `after` at once."""
        from functools import partial

        from llmkit.data.delimited import read_csv
        from llmkit.data.sources import chained

        read = partial(read_csv, delimiter=self.delimiter, names=self.names, encoding=self.encoding)
        return chained(self.path, read, after, self.take)


@config
class Text(Files):
    """Plain text: each document is a row with `text`."""

    kind: Literal["text"] = "text"
    document: Literal["line", "paragraph", "file"] = "line"
    """What a document is: a line, the lines between two blank ones, or the whole file."""
    encoding: Encoding = "utf-8"

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each document, or the error that a line is; begins behind the row `after` at once."""
        from functools import partial

        from llmkit.data.sources import chained
        from llmkit.data.text import read_text

        read = partial(read_text, document=self.document, encoding=self.encoding)
        return chained(self.path, read, after, self.take)


@config
class Arrow(Files):
    """An Arrow file or stream (IPC), or a folder that the library `datasets` saved (needs `pip install pyarrow`)."""

    kind: Literal["arrow"] = "arrow"
    split: str | None = None
    """Which data set of a saved folder of several."""

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each row; begins behind the row `after` with its record batch."""
        from llmkit.data.arrow import read_arrow, saved
        from llmkit.data.sources import chained

        return chained(saved(self.path, self.split), read_arrow, after, self.take)

    def files(self) -> dict[str, str]:
        """sha256 of each file that is read, by its path."""
        from llmkit.data.arrow import saved
        from llmkit.data.sources import digests

        return digests(saved(self.path, self.split))

    def marks(self) -> dict[str, str]:
        """Size and sha256 of both ends of each file, by its path."""
        from llmkit.data.arrow import saved
        from llmkit.data.sources import marks

        return marks(saved(self.path, self.split))


@config
class Hub:
    """A Hugging Face data set, through the library `datasets` (needs `pip install datasets`); no code of it is run."""

    kind: Literal["hub"] = "hub"
    name: str
    """`OWNER/NAME` on the Hub, a folder of data files, or a folder that `datasets` saved."""
    subset: str | None = None
    """Its configuration, where it has several."""
    split: str = "train"
    """A split, a part of one (`train[:5%]`, `train[1000:2000]`) or a sum of these (`train+test`)."""
    revision: str | None = None
    """A commit, tag or branch."""
    columns: Mapping[str, str] = setting(default_factory=dict)
    """What each of our columns is called there."""
    take: int | None = setting(default=None, least=1)
    """The first so many rows; all of them when not given."""
    weight: Weight | None = None
    """Its share of the mix, relative to the others'; or points `[[0, 1.0], [0.5, 0.2]]`: parts of the run and the share
    there, with straight lines between them."""

    def problems(self) -> Iterator[Conflict]:
        """Names in `columns` that nothing reads."""
        yield from unknown(self.columns)

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each row; begins behind the row `after` at once."""
        from llmkit.data.hub import read_hub

        return read_hub(self.name, self.subset, self.split, self.revision, after, self.take)

    def files(self) -> dict[str, str]:
        """sha256 of the Arrow files that the library made of the data set."""
        from llmkit.data.hub import hub_files

        return hub_files(self.name, self.subset, self.split, self.revision)

    def marks(self) -> dict[str, str]:
        """Its name with its revision."""
        return {self.name: f"{self.subset}, {self.split}, {self.revision}"}

    def here(self) -> list[str]:
        """The files of a folder of this machine."""
        from llmkit.data.stores import found_here

        return found_here(self.name) if not self.remote() else []

    def remote(self) -> bool:
        """Whether it is no folder of this machine."""
        return not Path(self.name).expanduser().is_dir()


@config
class Docstrings:
    """Function source -> first sentence of its docstring, from the running Python's own library, split by module."""

    columns: ClassVar[Mapping[str, str]] = {}
    kind: Literal["docstrings"] = "docstrings"
    split: Literal["train", "valid"] = "train"
    weight: Weight | None = None
    """Its share of the mix, as a file's."""
    labels: bool = False
    """Rows for `kind: classify` instead: the sentence, and whether the function gives a `value` or `nothing`."""
    pairs: bool = False
    """Rows for `kind: preference` instead: the sentence is chosen, and that of the function before it rejected."""
    steps: bool = False
    """Rows for `kind: reward` and steps: the sentence is right, and that of the function before it wrong."""

    @property
    def others(self) -> list[str]:
        """Which other kinds of rows are asked for."""
        return [kind for kind in ("labels", "pairs", "steps") if getattr(self, kind)]

    def problems(self) -> Iterator[Conflict]:
        """Rows of two kinds at once."""
        if len(self.others) > 1:
            other, key, *_ = self.others
            yield Conflict(key, "both say what rows are", "keep one of the two", other)

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each pair of the split; all that is before `after` is made again."""
        from llmkit.data.docstrings import read

        return read(self.split, after, "".join(self.others))

    def files(self) -> dict[str, str]:
        """Nothing: the running Python is named in the manifest."""
        return {}

    def marks(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def remote(self) -> bool:
        """No."""
        return False


@config
class Arithmetic:
    """Sums of two whole numbers and differences, made on the spot: `prompt`, `completion`, the result as `answer`."""

    columns: ClassVar[Mapping[str, str]] = {}
    kind: Literal["arithmetic"] = "arithmetic"
    split: Literal["train", "valid"] = "train"
    """No sum is in both."""
    weight: Weight | None = None
    """Its share of the mix, as a file's."""
    take: int = setting(default=1000, least=1)
    """Rows."""
    most: int = setting(default=99, least=9)
    """The largest number."""
    pairs: bool = False
    """Rows for `kind: preference` and `kind: reward` instead: the right answer is chosen; rejected are other numbers,
    numbers without their tags, and many words."""
    shown: int = setting(default=0, least=0, most=511)
    """Sums of the training split that stand before each, with their answers in the format: a row holds 1024 messages
    at most."""

    def rows(self, after: At = ()) -> Iterator[Raw | BadRow]:
        """Each row of the split."""
        from llmkit.data.arithmetic import read

        return read(self.split, self.take, self.most, after, self.pairs, self.shown)

    def files(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def marks(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def remote(self) -> bool:
        """No."""
        return False


Source = Annotated[Jsonl | Json | Parquet | Csv | Text | Arrow | Hub | Docstrings | Arithmetic, Later(("python",))]
