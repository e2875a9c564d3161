"""The processes of a program, as /proc lists them, for limits on their sum."""

import os
from collections import defaultdict

_SOCKET_BYTES = 1 << 18
"""A Unix socket's buffer, as Linux has it."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


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
    """Bytes that processes have written, shared pages by share; where the kernel does not say that, all that they have mapped.

    And what may lie in the buffers of their sockets, which is in no process.
    """
    total = _SOCKET_BYTES * len(_sockets(pids))
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


def cpu_s(pids: list[int]) -> float:
    """CPU seconds that processes have taken, with those of the children that they have waited for."""
    ticks = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                ticks += sum(map(int, file.read().rpartition(b")")[2].split()[11:15]))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return ticks / _TICKS


def waiting(pids: list[int]) -> tuple[int, float]:
    """How many threads there are, and seconds in which that one of them which waited longest was ready to run and others had the CPUs.

    0 s where the kernel does not keep account of it (CONFIG_SCHED_INFO).
    """
    threads, longest = 0, 0
    for pid in pids:
        try:
            names = os.listdir(f"/proc/{pid}/task")
        except (FileNotFoundError, ProcessLookupError):
            continue
        threads += len(names)
        for name in names:
            try:
                with open(f"/proc/{pid}/task/{name}/schedstat", "rb") as file:
                    longest = max(longest, int(file.read().split()[1]))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return threads, longest / 1e9


def _sockets(pids: list[int]) -> set[str]:
    found = set()
    for pid in pids:
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return {target for target in found if target.startswith("socket:")}
