"""What all tests have in common. To be set before torch is imported: its threads spin for each
other as briefly as the worker's do, since other processes want the cores as well."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores Ctrl-C for what a script puts into the background, and a process that is started
    # from here would inherit that: tests that press Ctrl-C need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
