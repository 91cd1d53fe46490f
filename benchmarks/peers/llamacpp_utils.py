"""What the tests of llama.cpp's server import as `utils`, written against the names that they use: it starts ours.

Their start-up settings become a recipe of ours, their routes ours (`/completion` is `/v1/completions`), their fields
ours where both have a word for the same. What ours has no word for is left out of requests, and missing in answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import requests
from llamacpp_words import asked, told, told_in_parts

__all__ = ["OpenAI", "ServerError", "ServerPreset", "ServerProcess", "match_regex", "note", "parallel_function_calls"]
MODEL, MOST = os.environ["SERVED"], 3
NOTES: list[str] = []
"""What did not hold in the test that runs."""
RUNNING: dict[str, tuple[subprocess.Popen[bytes], str]] = {}
"""Recipe -> the server that was started by it and its address: tests of equal settings share one."""


def note(line: int, said: str, cause: Exception) -> None:
    """An assertion that failed; the test goes on."""
    why = "" if isinstance(cause, AssertionError) else f" ({type(cause).__name__}: {cause})"
    one = f"{line}: {' '.join(said.split())}{why}"
    if one not in NOTES:
        NOTES.append(one)


def match_regex(pattern: str, text: str) -> bool:
    """Whether it occurs, in letters of either case."""
    import re

    return re.search(pattern, text, re.IGNORECASE | re.MULTILINE | re.DOTALL) is not None


def parallel_function_calls(calls: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """What each gives, all run at once; None of one that fails, which is noted."""

    def one(work: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        try:
            return work(*given)
        except (AssertionError, KeyError, TypeError, requests.RequestException) as cause:
            note(0, f"{work.__name__} beside others: {cause}", cause)
            return None

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(one, *call) for call in calls]]


class ServerError(Exception):
    """A stream was refused."""

    def __init__(self, code: int, body: Any) -> None:
        self.code, self.body = code, body


class Answer(NamedTuple):
    """What came back."""

    status_code: int
    headers: dict[str, str]
    body: Any


class OpenAI(openai.OpenAI):
    """OpenAI's client, whose model is the one that is served: llama.cpp reads no name."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how, http_client=httpx.Client(transport=_Named()), max_retries=0)


class _Named(httpx.HTTPTransport):
    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.read())
        body.pop("model", None)
        headers = {key: value for key, value in request.headers.items() if key not in ("content-length", "host")}
        return super().handle_request(httpx.Request(request.method, request.url, headers=headers, json=body))


class ServerProcess:
    """Settings by llama.cpp's names, and a server of ours."""

    server_host, server_port = "127.0.0.1", 0
    model_alias, api_key, chat_template = "tinyllama-2", None, None
    n_ctx, n_slots, n_batch, n_predict = 512, 2, 32, None
    seed, temperature, pooling = 42, 0.8, None
    kv_unified = no_ui = False

    def recipe(self) -> dict[str, Any]:
        """The same as a recipe."""
        length = self.n_ctx if self.kv_unified else self.n_ctx // self.n_slots
        made: dict[str, Any] = {"kind": "serve", "port": 0, "name": self.model_alias, "record": False, "out": "."}
        made |= {"bounds": {"length": length}, "engine": {"tokens": self.n_batch, "cache": {"size": 64 << 20}}}
        template = {"template": _template(self.chat_template)} if self.chat_template else {}
        keys = {"key_file": _written("keys", self.api_key)} if self.api_key else {}
        return made | {"model": {"name": MODEL, **template}, "playground": not self.no_ui, **keys}

    def start(self, timeout_seconds: float = 120) -> None:
        """Ready to be asked."""
        said = json.dumps(self.recipe() | {"port": self.server_port})
        if self.server_port:  # other settings at the address that the test knows
            before = next(recipe for recipe, (_, url) in RUNNING.items() if url.endswith(f":{self.server_port}"))
            _end(RUNNING.pop(before)[0])
        if said not in RUNNING:
            while len(RUNNING) >= MOST:
                _end(RUNNING.pop(next(iter(RUNNING)))[0])
            RUNNING[said] = _started(said, timeout_seconds)
        RUNNING[said] = RUNNING.pop(said)  # the one used last goes last
        self.server_port = int(RUNNING[said][1].rpartition(":")[2])

    def stop(self) -> None:
        """Another test may want it."""

    def make_request(
        self, method: str, path: str, data: Any = None, headers: Any = None, timeout: float = 120, host: str = ""
    ) -> Answer:
        """One answer, in llama.cpp's words."""
        route, body = asked(self, path, data)
        url = f"http://{host or self.server_host}:{self.server_port}{route}"
        got = requests.request(method, url, headers=headers, json=body, timeout=timeout)
        made = got.json() if got.headers.get("content-type", "").startswith("application/json") else got.text
        return Answer(got.status_code, dict(got.headers), told(path, data, made) if got.ok else made)

    def make_stream_request(
        self, method: str, path: str, data: Any = None, headers: Any = None, host: str = ""
    ) -> Iterator[Any]:
        """An answer in parts."""
        route, body = asked(self, path, data)
        url = f"http://{host or self.server_host}:{self.server_port}{route}"
        got = requests.request(method, url, headers=headers, json=body, stream=True, timeout=120)
        if got.status_code != 200:
            raise ServerError(got.status_code, got.json())
        for line in got.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield from told_in_parts(path, json.loads(line[6:]))


def _template(said: str) -> str:
    return said if said in ("chatml", "llama3") else _written("template.jinja", said)


def _written(name: str, text: str) -> str:
    path = Path(tempfile.gettempdir()) / f"{hashlib.sha256(text.encode()).hexdigest()}-{name}"
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def _started(recipe: str, seconds: float) -> tuple[subprocess.Popen[bytes], str]:
    folder = Path(tempfile.mkdtemp())
    (folder / "serve.yaml").write_text(recipe)  # JSON is YAML
    log, end = folder / "log", time.monotonic() + seconds
    words = [sys.executable, "-m", "llmkit", "serve", MODEL, "--recipe", "serve.yaml"]
    with log.open("w") as said:
        process = subprocess.Popen(words, stderr=said, stdout=said, cwd=folder)
    while time.monotonic() < end and process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("{") and json.loads(line).get("event") == "ready":
                return process, json.loads(line)["url"]
        threading.Event().wait(0.1)
    _end(process)
    raise RuntimeError(log.read_text()[-1000:])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(30)


class ServerPreset:
    """The servers that the tests name: all of them serve the one model."""

    @staticmethod
    def tinyllama2() -> ServerProcess:
        """That makes texts."""
        made = ServerProcess()
        made.n_predict = 64
        return made

    @staticmethod
    def bert_bge_small() -> ServerProcess:
        """That makes vectors."""
        made = ServerProcess()
        made.model_alias, made.n_batch = "bert-bge-small", 128
        return made

    @staticmethod
    def bert_bge_small_with_fa() -> ServerProcess:
        """The same with longer texts."""
        made = ServerPreset.bert_bge_small()
        made.n_ctx, made.n_batch = 1024, 300
        return made
