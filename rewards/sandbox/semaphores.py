"""multiprocessing's semaphores where a program has no /dev/shm of its own.

The machine's /dev/shm holds what other processes share, so a program without a mount namespace must not reach it; named semaphores,
which multiprocessing uses, live there. These have no name: they are in memory that forks inherit.
"""

import _multiprocessing  # type: ignore[import-not-found]
import ctypes
import mmap
import threading
import time
from multiprocessing import heap
from typing import Any

_SIZE = 64
"""At least sizeof(sem_t) on every machine."""


class SemLock:
    """Stands in for `_multiprocessing.SemLock` under the fork start method."""

    SEM_VALUE_MAX = 0x7FFFFFFF

    def __init__(self, kind: int, value: int, maxvalue: int, name: str, unlink: bool) -> None:
        self.kind, self.maxvalue, self.name, self.handle = kind, maxvalue, name, 0
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._memory = mmap.mmap(-1, _SIZE)
        self._semaphore = ctypes.c_char.from_buffer(self._memory)
        self._libc.sem_init(ctypes.byref(self._semaphore), 1, value)
        self._held, self._owner = 0, 0

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        if self.kind == 0 and self._is_mine():
            self._held += 1
            return True
        if not self._wait(block, timeout):
            return False
        self._held += 1
        self._owner = threading.get_ident()
        return True

    def release(self) -> None:
        if self.kind == 0:
            if not self._is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if self._held > 1:
                self._held -= 1
                return
        elif self._get_value() >= self.maxvalue:
            raise ValueError("semaphore or lock released too many times")
        self._held -= 1
        self._libc.sem_post(ctypes.byref(self._semaphore))

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: Any) -> None:
        self.release()

    def _wait(self, block: bool, timeout: float | None) -> bool:
        # Python signal handlers run between tries; a wait in C would keep them off.
        end = None if timeout is None else time.monotonic() + max(0.0, timeout)
        pause = 0.0001
        while self._libc.sem_trywait(ctypes.byref(self._semaphore)):
            if not block or (end is not None and time.monotonic() >= end):
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        return True

    def _get_value(self) -> int:
        value = ctypes.c_int()
        self._libc.sem_getvalue(ctypes.byref(self._semaphore), ctypes.byref(value))
        return value.value

    def _is_zero(self) -> bool:
        return self._get_value() == 0

    def _count(self) -> int:
        return self._held

    def _is_mine(self) -> bool:
        return self._held > 0 and self._owner == threading.get_ident()

    def _after_fork(self) -> None:
        self._held = 0


def install() -> None:
    _multiprocessing.SemLock = SemLock
    heap.Arena._dir_candidates = []  # type: ignore[attr-defined]  # shared values in the temporary folder
