"""Processes that are forked from this one, which has imported all that they need."""

import gc
import os
import signal
import sys
import time


class Forked:
    """Runs `work` in a process of its own."""

    def __init__(self, work, *given, err=None):
        self.status = None
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                gc.freeze()  # threads of a group of ranks are not here: to collect what it left would wait for them
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                if err is not None:
                    os.dup2(err, 2)
                    sys.stderr = os.fdopen(2, "w", buffering=1)  # and not what a test catches
                code = work(*given) or 0
            finally:
                os._exit(code)

    def poll(self):
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def wait(self, seconds=30.0):
        end = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        return self.status
