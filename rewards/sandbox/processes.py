"""The processes of a program, as /proc lists them, for where no namespace ends them together and for limits on their sum.

A process that may fork while it is being killed is stopped first: what is stopped starts nothing, so the search comes to an end.
"""

import os
import signal
from collections import defaultdict

_PAGE = os.sysconf("SC_PAGE_SIZE")


def children() -> dict[int, list[int]]:
    """Process ids by that of their parent; empty without /proc."""
    found: dict[int, list[int]] = defaultdict(list)
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            found[int(fields[1])].append(int(name))
    return found


def threads_of(uid: int) -> int:
    """Threads of a user, which is what RLIMIT_NPROC counts."""
    count = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                count += len(os.listdir(f"/proc/{entry.name}/task"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return count


def tree(root: int, by_parent: dict[int, list[int]]) -> list[int]:
    """`root` and all that descend from it, each once: /proc is read while it changes, and a number that is used again closes a circle."""
    found = {root: None}
    waiting = [root]
    while waiting:
        fresh = [pid for pid in by_parent.get(waiting.pop(), []) if pid not in found]
        found |= dict.fromkeys(fresh)
        waiting += fresh
    return list(found)


def memory(pids: list[int]) -> int:
    """Bytes that processes have written, shared pages by share; where the kernel does not say that, all that they have mapped."""
    total = 0
    for pid in pids:
        try:
            try:
                with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                    total += next(int(line.split()[1]) for line in file if line.startswith(b"Pss:")) << 10
            except (PermissionError, StopIteration):
                with open(f"/proc/{pid}/statm", "rb") as file:
                    total += int(file.read().split()[1]) * _PAGE
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def kill_trees(roots: list[int]) -> None:
    """Stops all of some trees, then kills it."""
    stopped: set[int] = set()
    while True:
        by_parent = children()
        fresh = {pid for root in roots for pid in tree(root, by_parent)} - stopped
        if not fresh:
            break
        for pid in fresh:
            _signal(pid, signal.SIGSTOP)
        stopped |= fresh
    for pid in stopped:
        _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
