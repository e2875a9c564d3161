"""A tracer for each program where the server has no process id namespace of its own: what ends the tracer ends all of the program.

The kernel attaches the tracer to every process and thread that the program starts, before it runs a first instruction, and kills all
of them in the moment in which the tracer ends, however it ends (PTRACE_O_EXITKILL). So a program cannot leave anything: no double
fork, session or ignored signal takes a process out of its tracer's hands, and a fork that is under way fails. The tracer in turn ends
with the server, the server with the judge.

It also counts: each new process or thread waits for the tracer, which ends all when there are more than `limits.processes`. The count
is of one program alone, unlike RLIMIT_NPROC, which is of all that a user runs.
"""

import json
import os
import signal
from collections.abc import Callable
from typing import Any, NoReturn

from rewards.sandbox import kernel
from rewards.sandbox.limits import Limits

_ALL = 0x40000000
"""__WALL: threads too."""
_OPTIONS = kernel.PTRACE_O_TRACEFORK | kernel.PTRACE_O_TRACEVFORK | kernel.PTRACE_O_TRACECLONE | kernel.PTRACE_O_EXITKILL


def trace(server: int, limits: Limits, report: int, program: Callable[[], NoReturn]) -> NoReturn:
    """In a fork of the server: runs `program` in a fork of its own and writes into `report` how that ended."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)  # it died before the line above
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)  # what the program orphans stays below, where the server's /proc walk finds it
    try:
        try:
            result = _follow(_begin(program), limits)
        except OSError as error:
            result = {"failed": f"its tracer failed: {error} (kernel.yama.ptrace_scope must be 0 or 1)", "alone": False}
        os.write(report, json.dumps(result).encode())
    finally:
        os._exit(0)  # whatever happens: a fork of the server must not go on as one


def _begin(program: Callable[[], NoReturn]) -> int:
    """Forks the program, which waits until it is traced."""
    wait, go = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(go)
        if os.read(wait, 1) != b"g":
            os._exit(1)
        os.close(wait)
        program()
    kernel.ptrace(kernel.PTRACE_SEIZE, pid, _OPTIONS)
    os.write(go, b"g")
    os.close(wait)
    os.close(go)
    return pid


def _follow(program: int, limits: Limits) -> dict[str, Any]:
    """Lets all of a program run until its first process has ended, or until there are too many; the kernel ends the others then."""
    alive, alone = {program}, True
    while True:
        pid, status, _ = os.wait4(-1, _ALL)
        if not os.WIFSTOPPED(status):
            alive.discard(pid)
            if pid == program:
                return {"status": os.waitstatus_to_exitcode(status), "ended_by": "", "alone": alone}
            continue
        alive.add(pid)
        alone = alone and len(alive) == 1
        if len(alive) > limits.processes:
            return {"status": -signal.SIGKILL, "ended_by": "processes", "alone": False}
        _resume(pid, os.WSTOPSIG(status), status >> 16)


def _resume(pid: int, number: int, event: int) -> None:
    """Lets a stopped one go on: with its signal, or as one that a signal has stopped, or just on."""
    try:
        if event == kernel.PTRACE_EVENT_STOP and number != signal.SIGTRAP:
            kernel.ptrace(kernel.PTRACE_LISTEN, pid, 0)
        else:
            kernel.ptrace(kernel.PTRACE_CONT, pid, 0 if event else number)
    except ProcessLookupError:
        pass  # killed while it was stopped
