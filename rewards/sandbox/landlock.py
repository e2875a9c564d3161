"""Landlock: files that a process may reach, said by the process itself and for good.

Rights that the kernel is too old to know are not asked for. From version 6 (Linux 6.12) it also keeps a program's signals and
abstract Unix sockets to itself.
"""

import os
import stat
import struct
from collections.abc import Iterable

from rewards.sandbox import kernel

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
READ = _EXECUTE | _READ_FILE | _READ_DIR
WRITE = (1 << 16) - 1
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_KNOWN = {1: _REFER - 1, 2: _TRUNCATE - 1, 3: _IOCTL_DEV - 1, 4: _IOCTL_DEV - 1}
"""Rights by version; from 5 on all."""
TRUNCATION_SINCE = 3
"""The version that keeps files from being emptied, which opening them for nothing else can do."""
SIGNALS_SINCE = 6
"""The version that keeps signals inside."""


def restrict(version: int, readable: Iterable[str], writable: Iterable[str]) -> None:
    """Leaves this process and what it starts only these paths; those that do not exist are left out. Needs no_new_privs."""
    known = _KNOWN.get(version, WRITE)
    attributes = struct.pack("=Q", known)
    if version >= 4:
        attributes += struct.pack("=Q", 3)  # TCP: bind, connect
    if version >= SIGNALS_SINCE:
        attributes += struct.pack("=Q", 3)  # abstract Unix sockets, signals
    ruleset = kernel.landlock_ruleset(attributes)
    for paths, rights in ((readable, READ), (writable, WRITE)):
        for path in paths:
            _allow(ruleset, path, rights & known)
    kernel.landlock_restrict(ruleset)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        rights &= _OF_FILES
    kernel.landlock_allow(ruleset, rights, fd)
    os.close(fd)
