"""`llmkit doctor --cluster`: what a long run rests on, measured across its ranks."""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from llmkit.core.environment import prepare
from llmkit.core.errors import PeerError, ResourceError
from llmkit.core.peers import Alone
from llmkit.core.ranks import ranks


def cluster(folder: str, as_json: bool) -> None:
    """Measures, and prints what was found.

    Raises:
        PeerError: ranks disagree.
        ResourceError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise ResourceError(f"--disk {folder} is no folder", fix="name a folder on the disk that is to be measured")
    prepare()
    from llmkit.core.memory import device
    from llmkit.parallel.group import joined
    from llmkit.parallel.survey import survey

    mine, kind = ranks(), device()
    with joined(mine, kind) if mine.world > 1 else nullcontext(Alone()) as peers:
        found = survey(peers, kind, Path(folder), _facts(kind))
    if mine.main:
        sys.stdout.write(json.dumps(found) + "\n" if as_json else _text(found))
        sys.stdout.flush()
    if wrong := [one["what"] for one in found["findings"] if one["disagree"]]:
        more = f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""
        error = PeerError(wrong[0] + more, fix="give every rank the same installation and a synced clock")
        error.speaks = mine.main
        raise error


def _facts(kind: str) -> dict[str, str]:
    """What ranks of one run have in common."""
    import torch

    from llmkit.checkpoint.identity import code, packages, processor

    gpu = torch.cuda.get_device_name() if kind == "cuda" else "none"
    cuda = f"{torch.version.cuda}, nccl {'.'.join(map(str, torch.cuda.nccl.version()))}" if kind == "cuda" else "none"
    here = {"python": sys.version.split()[0], "gpu": gpu, "cuda": cuda, "processor": processor()}
    ours = hashlib.sha256(json.dumps(code()).encode()).hexdigest()[:12]  # a checkout has no version that tells
    return here | {"threads": str(torch.get_num_threads()), "code": ours} | packages()


def _text(found: dict[str, Any]) -> str:
    rows = [("rank", "GFLOP/s", "disk MiB/s", "clock ms", "round trip ms")]
    for one in found["ranks"]:
        figures = one["compute_gflops"], one["disk_mib_per_second"], 1e3 * one["clock_seconds"]
        cells = [one["name"], *(f"{n:.1f}" for n in figures), f"{1e3 * one['round_trip_seconds']:.2f}"]
        rows.append(tuple(cells))
    parts = [_table(rows)]
    if found["collectives"]:
        sizes = [("all-reduce", "ms", "bus GB/s")]
        for one in found["collectives"]:
            sizes.append((f"{one['bytes'] >> 10} KiB", f"{1e3 * one['seconds']:.2f}", f"{one['gb_per_second']:.2f}"))
        parts.append(_table(sizes))
    said = [("disagree: " if one["disagree"] else "look at: ") + one["what"] for one in found["findings"]]
    parts.append("\n".join(said or [f"{found['world']} ranks, nothing to look at"]) + "\n")
    return "\n".join(parts)


def _table(rows: list[Any]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join(lines) + "\n"
