"""Send a signal to the ranks of a session (launch/local.sh), or with ``all`` to every process in it.

``pass_on.py SIGNAL SESSION [all]``; exits with 1 where there was none.
"""

import os
import signal
import sys
from contextlib import suppress

import psutil

name, session, *everyone = sys.argv[1:]
sent = 0
for process in psutil.process_iter():
    with suppress(psutil.Error, ProcessLookupError):
        if os.getsid(process.pid) != int(session):
            continue
        # DeepSpeed's own processes have other modules before this one.
        if everyone or process.cmdline()[1:5] == ["-u", "-m", "distprune", "train"]:
            process.send_signal(getattr(signal, f"SIG{name}"))
            sent += 1
sys.exit(0 if sent else 1)
