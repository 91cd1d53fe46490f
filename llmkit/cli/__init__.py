"""The command line."""

import signal
import sys
from pathlib import Path

if Path(sys.argv[0]).name == "llmkit" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    # while our own modules are read, Ctrl-C ends the command without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
