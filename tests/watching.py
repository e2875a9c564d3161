"""What tests of processes look at: which are there, and when that changes."""

import contextlib
import os
import time
from pathlib import Path


def processes_with(mark):
    """The processes with this mark in their command line, zombies not, by /proc."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in Path(f"/proc/{name}/cmdline").read_bytes() and int(name) != os.getpid():
                found.append(int(name))
        except OSError:
            continue
    return found


def wait_until(holds, seconds):
    """Whether it held at one look within that time: what held once may not hold at the next, as processes come and go."""
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    return held


def sessions_of(pids):
    """The sessions that these processes are in, which stay as long as one of them does."""
    found = set()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            found.add(os.getsid(pid))
    return found
