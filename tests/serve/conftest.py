"""A server over a tiny model, in one process: the engine's half runs in a thread of it, over the same socket."""

import asyncio
import contextlib
import threading
from dataclasses import replace

import httpx
import pytest

from llmkit.build.llm import engine_of
from llmkit.serve.app import App
from llmkit.serve.messages import Link
from llmkit.serve.remote import Remote
from llmkit.serve.served import served_of
from llmkit.serve.service import Service
from llmkit.serve.worker import Worker


class Thread:
    """In the place of a process."""

    pid = 0

    def __init__(self, own, llm):
        self.own = own.dup()
        self.own.setblocking(True)
        self.thread = threading.Thread(target=self._run, args=(llm,), daemon=True)
        self.thread.start()

    def _run(self, llm):
        link = Link(self.own)
        assert next(iter(link.read(10)))
        own = engine_of(llm.loaded)  # tests ask the model's own engine meanwhile, and an engine is one thread's
        Worker(link, replace(served_of(llm), engine=own)).run()

    def poll(self):
        return None if self.thread.is_alive() else 0

    def kill(self):
        self.own.shutdown(2)


@pytest.fixture(scope="session")
def llm(tiny):
    from llmkit.build.llm import LLM

    return LLM(str(tiny))


class Running:
    """A server that answers on a port, in a thread."""

    def __init__(self, llm, **how):
        from llmkit.serve.run import listen, run

        self.loop = asyncio.new_event_loop()
        self.engine = Remote({"model": "tiny"}, lambda theirs: Thread(theirs, llm))
        self.service = Service("tiny", self.engine, llm.tokenizer, **how)
        self.app = App(self.service)
        own = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{own.getsockname()[1]}"
        self.task = None
        self.thread = threading.Thread(target=self._run, args=(own, run), daemon=True)
        self.thread.start()
        with httpx.Client(base_url=self.url) as client:
            while client.get("/health").status_code != 200:
                pass

    def _run(self, own, run):
        asyncio.set_event_loop(self.loop)
        running = run(self.app.asgi(), own, self.engine, self.service.bounds, lambda: 0, lambda: None)
        self.task = self.loop.create_task(running)
        with contextlib.suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self.task)

    def stop(self):
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(10)


@pytest.fixture(scope="session")
def server(llm):
    running = Running(llm)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
