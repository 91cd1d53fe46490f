"""The playground: a page that talks with this server over its own routes. Nothing in it comes from anywhere else."""

from __future__ import annotations

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "playground"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
FILES = ("style.css", "main.js", "answer.js", "client.js", "settings.js", "tip.js")
PATHS = {"/": "index.html"} | {f"/playground/{name}": name for name in FILES}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""That go with each of its files."""


@cache
def page(path: str) -> tuple[bytes, str] | None:
    """The content and the type of what stands at a path of the server, if it is part of the page."""
    name = PATHS.get(path)
    return (FOLDER.joinpath(name).read_bytes(), TYPES[Path(name).suffix]) if name is not None else None
