"""A contender of a benchmark: a process of its own that stands still while another has its turn."""

import json
import os
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

HERE = Path(__file__).parent


class Contender:
    """A process that runs a round when it is asked to, and stands still between."""

    def __init__(self, python, script, spec, environment):
        env = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"} | environment
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
        self.process = subprocess.Popen(
            [python, HERE / "peers" / script, json.dumps(spec | {"spawned": time.time()})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=env,
        )
        self.started, self.prefixes = self._heard(), script == "engine_llmkit.py"
        self._each("suspend")

    def round(self, asked):
        """What it says of one round, and its processor seconds."""
        self._each("resume")
        before = self._spent()
        print(json.dumps({"prompts": asked["prompts"]}), file=self.process.stdin, flush=True)
        told = self._heard()
        told["processor_seconds"] = self._spent() - before
        if self.prefixes:
            print(json.dumps({"long": asked["long"]}), file=self.process.stdin, flush=True)
            told |= self._heard()
        self._each("suspend")
        return self.started | told

    def end(self):
        """Lets it go; what does not go is killed."""
        self._each("resume")
        self.process.stdin.close()
        alive = psutil.wait_procs(self._family(), timeout=30)[1]
        for one in alive:
            one.kill()
        self.process.wait()

    def _heard(self):
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.errors.seek(0)
        raise SystemExit(self.errors.read().decode(errors="replace")[-3000:])

    def _family(self):
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _each(self, verb):
        for one in self._family():
            with suppress(psutil.NoSuchProcess):
                getattr(one, verb)()

    def _spent(self):
        return sum(one.cpu_times().user + one.cpu_times().system for one in self._family())
