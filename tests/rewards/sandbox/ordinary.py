"""Runs a command as an ordinary user, for tests that root runs: where an environment in root's home can still be read.

`python ordinary.py CHECKOUT COMMAND…`
"""

import os
import sys

sys.path.insert(0, sys.argv[1])

from rewards.sandbox import kernel, view
from rewards.sandbox.limits import Limits

UID = 65533


def main(checkout: str, *command: str) -> None:
    kernel.unshare(kernel.CLONE_NEWNS)
    view.build_root(view.readable_paths([checkout]), Limits())
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
