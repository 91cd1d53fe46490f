"""From an operator's settings to a server that runs."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Scope

from llmkit.core.errors import LlmkitError, RecipeError
from llmkit.core.memory import settle
from llmkit.inference.adapters import check_folders
from llmkit.inference.node import OwnEngine
from llmkit.models import safe
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.models.tokenizer import read_tokenizer
from llmkit.parallel.fits import check_tensor
from llmkit.serve import logs
from llmkit.serve.admin import Admin
from llmkit.serve.app import App
from llmkit.serve.caller import Caller
from llmkit.serve.door import Door
from llmkit.serve.floors import check_floors
from llmkit.serve.generated import Account
from llmkit.serve.hosts import Hosts
from llmkit.serve.idempotent import Idempotent
from llmkit.serve.journal import Journal, record
from llmkit.serve.keys import read_keys
from llmkit.serve.metrics import Metrics
from llmkit.serve.node import LOOPBACK, Bounds
from llmkit.serve.page import PATHS
from llmkit.serve.remote import Remote, Start, spawn
from llmkit.serve.run import Place, listen, run
from llmkit.serve.service import Service
from llmkit.serve.shed import Shed

LOG = logging.getLogger("llmkit.serve")


@dataclass(frozen=True)
class Settings:
    """What is served, where and to whom."""

    model: ModelRef
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    """Under which it is served; the model's own name without it."""
    keys: Path | None = None
    bounds: Bounds = field(default_factory=Bounds)
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Name -> folder."""
    adapter_root: Path | None = None
    """Under it adapters and weights are loaded by path, if an admin asks."""
    most_adapters: int = 16
    admin_port: int | None = None
    admin_keys: Path | None = None
    journal: Path | None = None
    playground: bool = True
    precision: str = "auto"
    allow_code: bool = False
    engine: OwnEngine = field(default_factory=OwnEngine)
    hosts: tuple[str, ...] = ()
    """Names beside this machine's own under which it may be asked without keys."""


def start(settings: Settings, how: Start = spawn) -> dict[str, Any]:
    """Serves until a signal; `how` starts the engine's process. Gives what the manifest of a run tells of it.

    Raises:
        LlmkitError: it cannot be served.
    """
    check_floors()
    check(settings)
    logs.begin()
    own = listen(settings.host, settings.port)
    admin = listen(settings.host, settings.admin_port) if settings.admin_port is not None else None
    LOG.info("loading", extra={"model": settings.model.name})  # it may take minutes, in which nothing else is said
    engine = Remote(told(settings), how)
    engine.begin()  # it imports and reads for seconds: what is to be read here is read beside it
    try:
        resolved = resolve(settings.model)
        tokenizer = read_tokenizer(resolved, settings.model, settings.allow_code)
        places = assemble(settings, engine, tokenizer, own, admin)
        _listen_for_keys([place.door for place in places])
        settle()
        asyncio.run(run(places, engine, settings.bounds))
    finally:
        engine.take_back()
        if settings.journal is not None and settings.journal.is_file() and not settings.journal.stat().st_size:
            settings.journal.unlink()  # nothing was asked: of a server that could not be started nothing is left
    return {key: engine.facts.get(key, "") for key in ("model", "exact")}


def told(settings: Settings) -> dict[str, Any]:
    """What the engine's process is told."""
    return {
        "model": asdict(settings.model),
        "precision": settings.precision,
        "allow_code": settings.allow_code,
        "engine": asdict(settings.engine),
        "adapters": dict(settings.adapters),
        "root": str(settings.adapter_root or ""),
        "most_adapters": settings.most_adapters,
        "loaded": {},
    }


def assemble(
    settings: Settings, engine: Remote, tokenizer: Any, own: socket.socket, admin: socket.socket | None = None
) -> list[Place]:
    """A server over an engine that is still to be started, on sockets that are bound.

    Raises:
        RecipeError, ResourceError: the keys cannot be read, or the record not be written.
    """
    service = Service(settings.name or settings.model.name, engine, tokenizer, settings.bounds)
    service.adapters |= dict.fromkeys(settings.adapters, "")
    metrics = Metrics(service)
    service.watchers.append(metrics.done)
    if settings.journal is not None:
        _journal(service, Journal(settings.journal))
    places = [Place(door(App(service, metrics, settings.playground).asgi(), service, metrics, settings), own)]
    if admin is not None:
        places.append(Place(Door(Admin(service, metrics).asgi(), service, settings.admin_keys), admin))
    engine.on_ready.append(lambda: _ready(service, own.getsockname()))
    return places


def door(app: ASGIApp, service: Service, metrics: Metrics, settings: Settings) -> Door:
    """What stands before the routes: keys, then whether there is room, then answers that are told again."""
    pages = [path.encode() for path in PATHS] if settings.playground else []
    inner = Shed(Idempotent(app, settings.bounds), service.gate, TAKING)
    made = Door(inner, service, settings.keys, pages, settings.hosts)
    service.gate.tenants = lambda: made.tenants  # as many as there are when the file is read again
    routes = {path: path for path in ROUTES}

    def over(caller: Caller, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        metrics.ended(routes.get(path, "other"), status)
        facts = {"request_id": caller.id, "tenant": caller.tenant, "method": scope["method"], "path": path}
        if status >= 400 or "refused" in scope:  # a stream that failed in the middle had begun with 200
            facts["refused"] = scope.get("refused") or str(status)
            metrics.refused(facts["refused"])
        level = logging.DEBUG if path in WATCHED else logging.INFO
        LOG.log(level, "request", extra={**facts, "status": status, "seconds": round(seconds, 6)})

    made.over.append(over)
    return made


WATCHED = ("/health", "/metrics")
"""What is asked every few seconds by those who watch."""
TAKING = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)
"""What asks the model, or its tokenizer, for something."""
ROUTES = ("/", "/health", "/metrics", "/openapi.json", "/v1/models", *TAKING)


def check(settings: Settings) -> None:
    """
    Raises:
        RecipeError: strangers could reach what asks for no key, a name is no host's, keys cannot be read, or too many
            processes are to share the model.
        ModelError: the model or an adapter is not where it is said to be.
    """
    if settings.host not in LOOPBACK and settings.keys is None:
        what = f"{settings.host} can be reached by others, and no key is asked for"
        raise RecipeError(what, fix="give --api-key-file", key="host")
    if settings.admin_port is not None and settings.admin_keys is None:
        raise RecipeError("the routes of admins ask for a key", fix="give --admin-key-file", key="admin_port")
    if (name := settings.name or settings.model.name) in settings.adapters:
        raise RecipeError(f"{name} is the model's own name too", fix="give one another name", key=f"adapters.{name}")
    Hosts(settings.hosts)
    check_folders(settings.adapters)
    for path in (settings.keys, settings.admin_keys):
        if path is not None:
            read_keys(path)
    if not Path(settings.model.name).expanduser().is_dir():
        resolve(settings.model)  # a folder's files are read whole: that is done beside the engine that is being started
    if settings.engine.tensor > 1:
        resolved = resolve(settings.model)
        config = safe.read_json((resolved.base or resolved).folder / "config.json")
        check_tensor(config, settings.engine.tensor, "engine.tensor")


def _journal(service: Service, journal: Journal) -> None:
    def write(account: Account) -> None:
        weights = str(service.engine.facts.get("model", {}).get("sha256", ""))
        journal.write(record(account, "single", weights, account.adapter))

    service.watchers.append(write)


def _listen_for_keys(doors: list[Door]) -> None:
    def again(*_: object) -> None:
        for one in doors:
            try:
                one.read_again()
            except LlmkitError as cause:
                LOG.error("the keys stay as they were", extra={"why": str(cause)})

    signal.signal(signal.SIGHUP, again)


def _ready(service: Service, address: tuple[object, ...]) -> None:
    for name in service.adapters.keys() - set(service.engine.facts["adapters"]):
        LOG.error("an adapter is gone", extra={"adapter": name})  # it was there before the engine was started again
        del service.adapters[name]
        service.engine.settings["loaded"].pop(name, None)
    host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
    url = f"http://{host}:{address[1]}"
    own, asked = service.engine.facts["longest"], service.bounds.length
    if asked is not None and asked > own:
        what = "bounds.length is more than the model takes, and that many are taken"
        LOG.warning(what, extra={"length": asked, "longest": own})
    facts = {"longest": service.longest, "exact": service.engine.facts["exact"]}
    LOG.info("ready", extra={"url": url, "model": service.name, **facts})
