"""A worker process as the trainer sees it: started clean, asked by one pipe, answered by another, killed with all it started.

It is a fresh interpreter, never a fork of a process that holds torch and threads. Its environment is cleaned: a reward function
sees the variables that its recipe names, and what any program needs: where things lie, which GPUs are this job's, the Hugging Face
cache, certificates, and proxies, but no proxy whose URL has a user and password. Neither reading nor writing ever waits for it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rewards.worker import main; main(*map(int, sys.argv[2:]))"
_KEPT = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "SSL_CERT_FILE", "NO_PROXY", "no_proxy",
)  # fmt: skip
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
"""Kept as well, but where one has a user and password."""
_TAIL = 4000
"""Bytes of the log that a failure shows."""


class WorkerLost(Exception):
    """The worker died, or wrote what is no reply. The message says how."""


class WorkerProcess:
    """One worker process, and the log of what it prints."""

    def __init__(self, env: Sequence[str], log_path: Path | None = None) -> None:
        requests_read, self.requests = os.pipe()
        self.replies, replies_write = os.pipe()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self._log = log_path.open("ab+") if log_path else tempfile.TemporaryFile()
        self._log_mark = 0
        self._unsent = b""
        self._unread = b""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path), *map(str, (os.getpid(), requests_read, replies_write))],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=_clean_environment(env),
            pass_fds=(requests_read, replies_write),
            start_new_session=True,  # Ctrl-C is the trainer's; and what it starts is killed with it, as a group
        )
        os.close(requests_read)
        os.close(replies_write)

    def send(self, line: bytes) -> bool:
        """Sends a request as far as the pipe takes it; whether something is left to `flush`."""
        self._unsent += line
        return self.flush()

    def mark_log(self) -> None:
        """From here on counts what `said` shows."""
        self._log_mark = os.fstat(self._log.fileno()).st_size

    def flush(self) -> bool:
        """Sends what is left as far as the pipe takes it; whether something still is."""
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self.requests, self._unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent = b""  # reading its replies says how it died
        return bool(self._unsent)

    def read(self) -> list[dict[str, Any]]:
        """The replies that have come; raises WorkerLost."""
        try:
            while chunk := os.read(self.replies, 1 << 16):
                self._unread += chunk
        except BlockingIOError:
            if self._process.poll() is None:
                return self._replies()
        replies = self._replies()
        if replies:
            return replies  # the last words of a dead process; the next read finds it dead
        raise WorkerLost(self._how_it_died())

    def kill(self) -> None:
        """Ends the process and whatever it started, at once."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it is gone, and nothing of its group is left
        self._process.wait()
        os.close(self.requests)
        os.close(self.replies)
        self._log.close()

    def stack(self) -> str:
        """Where it is now, for a call that hangs: its Python stack, or the end of its log."""
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)  # for faulthandler to write
        return self.said()

    def said(self) -> str:
        """The end of what it printed since the mark."""
        size = os.fstat(self._log.fileno()).st_size
        start = max(self._log_mark, size - _TAIL)
        return os.pread(self._log.fileno(), size - start, start).decode("utf-8", "replace").strip()

    def _replies(self) -> list[dict[str, Any]]:
        *lines, self._unread = self._unread.split(b"\n")
        try:
            replies = [json.loads(line) for line in lines]
        except ValueError:
            raise WorkerLost(f"wrote what is no reply on the reply pipe: {lines[0][:80]!r}") from None
        if not all(isinstance(reply, dict) for reply in replies):
            raise WorkerLost(f"wrote what is no reply on the reply pipe: {lines[0][:80]!r}")
        return replies

    def _how_it_died(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "its process closed the reply pipe"
        return f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with exit code {code}"


def _clean_environment(names: Sequence[str]) -> Mapping[str, str]:
    open_proxies = [name for name in _PROXIES if "@" not in os.environ.get(name, "")]
    env = {name: os.environ[name] for name in (*_KEPT, *open_proxies, *names) if name in os.environ}
    # The order of a set must not differ between two runs; one thread each, as several run beside the learner.
    return env | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
